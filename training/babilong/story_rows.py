"""Rows of training tokens that tell bAbI's stories among book text, with questions anywhere. Owns what such a
row looks like; the masks and the background are those of ``training.rows``; knows no model.

Half of the rows are dense with stories, in the other half their facts stand far apart. Stories of a row are
told one after the other or woven into each other. A question stands where its story has it; those of a
story's end come then, or anywhere later, or last of all, as BABILong asks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mnemosyne.training.babilong.stories import Names, Story
from mnemosyne.training.babilong.strays import Strays
from mnemosyne.training.babilong.tasks import Question
from mnemosyne.training.corpus import Stream
from mnemosyne.training.facts import PROMPT
from mnemosyne.training.rows import Batch, Rows

KEEP = 0.7
"""Of the rows whose first story is told of bAbI's own people and things."""
AT_END = 0.5
"""Of the rows that ask what stories end with after all of them."""
WOVEN = 0.3
"""Of the rows whose stories are woven into each other."""
ONLY_LAST = 0.3
"""Of the stories that are asked at their end alone."""
_TRIES = 20
"""Stories that are looked at for one more that fits."""


@dataclass
class _Told:
    """A story in one row: where the sentences of its facts ended."""

    story: Story
    ends: list[int]


@dataclass(frozen=True)
class _Event:
    told: _Told
    question: Question | None
    """None: the story's next fact."""
    waits: bool = False
    """A question about a story's end: it may come later."""


class StoryRows(Rows):
    """``stories`` are those of each task; all entries are asked about equally often, so that one whose
    stories have a single question is told more often, and a task that has two entries twice as often."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        streams: Sequence[tuple[Stream, float]],
        seed: int,
        stories: Sequence[Sequence[Story]],
    ) -> None:
        super().__init__(tokenizer, streams, seed)
        self._stories = [task for task in stories if task]
        if not self._stories:
            raise ValueError("there are no stories to tell")
        self._often = [len(task) / sum(len(story.questions) for story in task) for task in self._stories]
        self._random = random.Random(seed)
        self._strays = Strays((story for task in stories for story in task), self.ids, self.rng)
        self._pieces: dict[str, list[int]] = {}

    def row(self, out: Batch, row: int, length: int, noise: float) -> None:
        rng = self._random
        own = noise * rng.uniform(0.3, 1.7) if rng.random() < 0.5 else rng.uniform(0, min(noise, 10.0))
        told = self._choose(length, own)
        events = self._order([_Told(story, []) for story in told])
        room = length - sum(map(self._cost, told))
        share = [rng.expovariate(1.0) for _ in events]
        for i, event in enumerate(events):
            if event.question is not None:  # several at once often, and the first of them after a long time
                follows = i > 0 and events[i - 1].question is not None
                share[i] *= rng.choice((0.0, 0.0, 1.0)) if follows else rng.choice((0.0, 1.0, 4.0))
        total = sum(share) + rng.expovariate(10.0) + 1e-9
        passed = self._lay(out, row, events, [room * part / total for part in share])
        out.text[row, self._strays.strew(out.tokens[row], passed)] = False

    def background(self, length: int) -> NDArray[np.int32]:
        tokens = super().background(length)
        self._strays.strew(tokens, np.ones(length, np.bool_))
        return tokens

    def _choose(self, length: int, own: float) -> list[Story]:
        """Stories for one row: the first as long as the row holds, more of them while there is room for their
        ``own`` background too."""
        rng, names = self._random, Names(self._random)
        chosen: list[Story] = []
        room = float(length)
        for _ in range(_TRIES):
            (task,) = rng.choices(self._stories, self._often)
            story = rng.choice(task)
            story = self._cut(story, int(room), 0.0 if not chosen else own)
            if not story.questions:
                continue
            renamed = names.told_of_others(story, keep=not chosen and rng.random() < KEEP)
            if renamed is None:
                break
            if self._cost(renamed) > room:  # other names have other lengths
                continue
            chosen.append(renamed)
            room -= self._cost(renamed) + own * len(renamed.facts)
            if room < 0.1 * length:
                break
        return chosen

    def _cut(self, story: Story, room: int, own: float) -> Story:
        """The beginning of a story that fits, up to a question; sometimes with its last question alone."""
        places = sorted({len(question.facts) for question in story.questions}, reverse=True)
        for facts in places:
            part = story.until(facts)
            if self._cost(part) + own * facts <= room:
                last = [question for question in part.questions if len(question.facts) == facts]
                return (
                    Story(part.task, part.facts, tuple(last)) if self._random.random() < ONLY_LAST else part
                )
        return Story(story.task, (), ())

    def _order(self, told: Sequence[_Told]) -> list[_Event]:
        rng = self._random
        lines = [self._line(one) for one in told]
        if rng.random() < WOVEN:
            turns = [i for i, line in enumerate(lines) for _ in line]
            rng.shuffle(turns)
            events = [lines[i].pop(0) for i in turns]
        else:
            events = [event for line in lines for event in line]
        at_end = rng.random() < AT_END
        stays = [event for event in events if not event.waits]
        for event in (event for event in events if event.waits):
            first = max(
                i for i, other in enumerate(stays) if other.told is event.told and other.question is None
            )
            stays.insert(len(stays) if at_end else rng.randint(first + 1, len(stays)), event)
        return stays

    def _line(self, told: _Told) -> list[_Event]:
        """A story's facts and questions in their order."""
        line: list[_Event] = []
        waiting = list(told.story.questions)
        for i in range(1, len(told.story.facts) + 1):
            line.append(_Event(told, None))
            while waiting and len(waiting[0].facts) == i:
                line.append(_Event(told, waiting.pop(0), i == len(told.story.facts)))
        return line

    def _lay(
        self, out: Batch, row: int, events: Sequence[_Event], gaps: Sequence[float]
    ) -> NDArray[np.bool_]:
        """Write the row; where it is background `[T]`."""
        tokens, length = out.tokens[row], out.tokens.shape[1]
        passed = np.zeros(length, np.bool_)
        stream = self.source()
        start = self.jump(stream, length)
        at, owed = 0, 0.0
        for event, gap in zip(events, gaps, strict=True):
            owed += gap
            if gap:
                if self._random.random() < 0.1:
                    start = self.jump(stream, length)
                taken = self._sentences(stream, start, owed)
                tokens[at : at + taken] = stream.tokens[start : start + taken]
                passed[at : at + taken] = True
                at, start, owed = at + taken, start + taken, owed - taken
            if event.question is None:
                fact = event.told.story.facts[len(event.told.ends)]
                piece = self._piece(f" {fact}")
                out.fact[row, at : at + len(piece)] = 1
                out.fact[row, at + len(piece) - (3 if fact.endswith(" there.") else 2)] = 2
                out.text[row, at : at + len(piece)] = False
                at = self.put(tokens, at, piece)
                event.told.ends.append(at)
                continue
            at = self.put(
                tokens, at, self._piece(str(PROMPT["user"]).format(content=event.question.question))
            )
            answer = self._piece(f" {event.question.answer}")
            out.answer[row, at : at + len(answer)] = True
            out.text[row, at : at + len(answer)] = False
            rests = event.question.supporting or (len(event.question.facts) - 1,)
            out.distance[row, at : at + len(answer)] = at - event.told.ends[rests[0]]
            out.task[row, at : at + len(answer)] = event.told.story.task
            at = self.put(tokens, at, answer + self.stop)
        tokens[at:] = stream.tokens[start : start + length - at]
        passed[at:] = True
        return passed

    def _sentences(self, stream: Stream, start: int, owed: float) -> int:
        """Tokens of the whole sentences from ``start`` on that ``owed`` tokens hold."""
        last = stream.ended(int(start + owed)) - 1
        return max(0, int(stream.ends[last]) - start) if last >= 0 else 0

    def _piece(self, text: str) -> list[int]:
        if text not in self._pieces:
            self._pieces[text] = self.ids(text)
        return self._pieces[text]

    def _cost(self, story: Story) -> int:
        """Tokens of the facts and of the questions with their answers."""
        asked = (
            len(self._piece(str(PROMPT["user"]).format(content=q.question)))
            + len(self._piece(f" {q.answer}"))
            + len(self.stop)
            for q in story.questions
        )
        return sum(len(self._piece(f" {fact}")) for fact in story.facts) + sum(asked)
