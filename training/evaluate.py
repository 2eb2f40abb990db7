"""How many facts of the held-out split a model answers after long documents, and how many without its memory.

Reads as a session does: chunks are committed, the question is read on top of the document's state, and the
answer is the likeliest token. The control asks the same state with the memory put back to M_0; what attention
sees stays.

    python -m mnemosyne.training.evaluate --run build/run --lengths 16000:8,64000:4,250000:2
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from mnemosyne.engine.advance import split
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import SessionState
from mnemosyne.training import shards
from mnemosyne.training.facts import Fact, demo_text, hide, make_facts

BLOCK = 64
"""Chunks read in one call."""
QUESTIONS_AT_ONCE = 160


def documents(
    tokenizer: Tokenizer, length: int, count: int, facts: int, seed: int
) -> list[tuple[str, list[Fact]]]:
    """``count`` texts of about ``length`` tokens, each with its own facts, from different places of the
    manuals."""
    background = demo_text(length * 4)
    ids: list[int] = tokenizer.encode(background, add_special_tokens=False).ids
    rng = random.Random(seed)
    made = []
    for i in range(count):
        own = make_facts(seed * 1000 + i, facts)
        start = rng.randrange(max(1, len(ids) - length))
        text: str = tokenizer.decode(ids[start : start + length - 14 * facts], skip_special_tokens=False)
        made.append((hide(text, own, seed * 1000 + i)[0], own))
    return made


def read(
    model: Titans, states: Sequence[SessionState], tokens: Sequence[Sequence[int]]
) -> list[SessionState]:
    """Each state after its tokens; sessions advance side by side, in blocks, as far as they have chunks
    left."""
    chunk = model.config.chunk
    parts = [split(state, ids, None, chunk) for state, ids in zip(states, tokens, strict=True)]
    done = [0] * len(states)
    bare = [SessionState(state.position, state.tensors) for state in states]
    while True:
        groups: dict[int, list[int]] = defaultdict(list)
        for b, (whole, _, _) in enumerate(parts):
            groups[min(BLOCK, (len(whole) - done[b]) // chunk)].append(b)
        groups.pop(0, None)
        if not groups:
            break
        for chunks, rows in groups.items():
            ids = np.stack([parts[b][0][done[b] : done[b] + chunks * chunk] for b in rows])
            after, _ = model.prefill([bare[b] for b in rows], torch.from_numpy(ids).to(model.device))
            for b, state in zip(rows, after, strict=True):
                bare[b] = state
                done[b] += chunks * chunk
    return [
        SessionState(s.position, s.tensors, part[1], part[2]) for s, part in zip(bare, parts, strict=True)
    ]


def forget(model: Titans, state: SessionState) -> SessionState:
    """The state with memory and momentum as at the start of a session, a MAC's of its segment too: the
    control."""
    initial = model.initial_state().tensors
    tensors = {
        n: initial[n] if n.startswith(("memory.", "momentum.", "segment_memory.")) else t
        for n, t in state.tensors.items()
    }
    return SessionState(state.position, tensors, state.pending, state.kinds)


def ask(model: Titans, tokenizer: Tokenizer, state: SessionState, facts: Sequence[Fact]) -> list[str]:
    """The word answered to each fact's question, every question on the same state."""
    said: list[str] = []
    for first in range(0, len(facts), QUESTIONS_AT_ONCE):
        some = facts[first : first + QUESTIONS_AT_ONCE]
        prompts = [tokenizer.encode(f.prompt, add_special_tokens=False).ids for f in some]
        logits, _ = model.open_chunk(read(model, [state] * len(some), prompts))
        said += [str(tokenizer.decode([i])).strip() for i in logits.argmax(-1).tolist()]
    return said


def evaluate(
    model: Titans, tokenizer: Tokenizer, length: int, count: int, facts: int = 40, seed: int = 1
) -> dict[str, float]:
    """Recall over ``count`` documents of about ``length`` tokens with ``facts`` each; shares in [0, 1]."""
    texts = documents(tokenizer, length, count, facts, seed)
    tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in texts]
    start = time.monotonic()
    states = read(model, [model.initial_state()] * count, tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - start
    right = control = 0
    worst = facts
    for state, (_, own) in zip(states, texts, strict=True):
        truth = [f.answer for f in own]
        here = sum(a == b for a, b in zip(ask(model, tokenizer, state, own), truth, strict=True))
        worst = min(worst, here)
        right += here
        control += sum(
            a == b for a, b in zip(ask(model, tokenizer, forget(model, state), own), truth, strict=True)
        )
    return {
        "length": sum(map(len, tokens)) / count,
        "documents": count,
        "facts": facts,
        "right": right / (facts * count),
        "worst": worst / facts,
        "control": control / (facts * count),
        "tokens_per_second": sum(map(len, tokens)) / seconds,
    }


def load_run(folder: Path) -> Titans:
    """The model of a training run, in fp32, on the GPU where there is one."""
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    model = Titans(ModelConfig.from_dict(facts["model"]))
    shards.load(folder, model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall of held-out facts over long documents.")
    parser.add_argument("--run", type=Path, required=True, help="folder that training wrote")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/mnemosyne-1/tokenizer.json"))
    parser.add_argument("--lengths", default="16000:8,64000:4,250000:2", help="tokens:documents, ...")
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load_run(args.run), Tokenizer.from_file(str(args.tokenizer))
    for pair in args.lengths.split(","):
        length, count = map(int, pair.split(":"))
        print(json.dumps(evaluate(model, tokenizer, length, count, args.facts, args.seed)), flush=True)


if __name__ == "__main__":
    main()
