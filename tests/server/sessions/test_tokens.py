"""Text as a stream: the same ids and the same text, wherever the bytes are cut."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mnemosyne.engine.errors import ConfigError, RequestError
from mnemosyne.engine.messages import Token
from mnemosyne.server.sessions.answertext import AnswerText
from mnemosyne.server.sessions.tokens import BLOCK, RUN, TextBlocks, TextTokenizer
from tests.server.sessions.harness import TEXT, tokenizer

AWKWARD = TEXT * 20 + "x" * 20_000 + "漢字" * 9_000 + " a" * 3000 + "\n" * 9000 + TEXT


def blocks_of(data: bytes, longest: int, rng: random.Random) -> list[str]:
    blocks, at = TextBlocks(), 0
    found: list[str] = []
    while at < len(data):
        part = data[at : at + rng.randint(1, longest)]
        found += blocks.feed(part)
        at += len(part)
    return found + list(blocks.feed(b"", final=True))


def test_blocks_depend_on_the_text_alone() -> None:
    data = AWKWARD.encode()
    expected = list(TextBlocks().feed(data, final=True))
    assert "".join(expected) == AWKWARD
    assert all(BLOCK <= len(block) <= RUN + 1 for block in expected[:-1])
    rng = random.Random(3)
    for longest in (60, 8193, 60_000):
        assert blocks_of(data, longest, rng) == expected


def test_a_document_has_the_ids_of_its_text() -> None:
    text = TEXT * 30
    assert tokenizer().encode_document(text) == tokenizer().encode(text)
    assert tokenizer().decode(tokenizer().encode_document(AWKWARD)) == AWKWARD
    texts = list(TextBlocks().feed(AWKWARD.encode(), True))
    blocks = tokenizer().blocks(texts)
    assert [block.ids for block in blocks] == [tokenizer().encode(text) for text in texts]
    assert sum(block.nbytes for block in blocks) == len(AWKWARD.encode())


def test_reading_may_begin_again_at_any_blocks_end() -> None:
    whole = list(TextBlocks().feed(AWKWARD.encode(), final=True))
    for number in range(len(whole)):
        rest = "".join(whole[number:]).encode()
        assert list(TextBlocks().feed(rest, final=True)) == whole[number:]


def test_characters_are_never_shown_in_halves() -> None:
    text = "Größe 你好 🙂"
    answer = AnswerText(tokenizer(), ())
    parts = [answer.push(Token(request_id="", index=0, token=byte_token(b))).text for b in text.encode()]
    assert "".join(parts) == text and "\ufffd" not in text
    answer.push(Token(request_id="", index=0, token=byte_token(0xC3)))
    assert answer.finish().text == "\ufffd"


def byte_token(byte: int) -> int:
    return next(token for token in range(320) if tokenizer().token_bytes(token) == bytes((byte,)))


@pytest.mark.parametrize("prefix_space", [True, False])
def test_a_tokenizer_that_cannot_stream_is_refused(prefix_space: bool) -> None:
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    with pytest.raises(ConfigError):
        TextTokenizer(made)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError):
        tokenizer().encode("\ud800")


def run(text: str, stops: tuple[str, ...]) -> tuple[str, str, str, list[str]]:
    """(text, text of the kept ids, text of the tokens, deltas) of an answer that would be ``text``."""
    answer, deltas = AnswerText(tokenizer(), stops), []
    for index, token in enumerate(tokenizer().encode(text)):
        deltas.append(answer.push(Token(request_id="", index=index, token=token)).text)
        if answer.stopped_at is not None:
            break
    deltas.append(answer.finish().text)
    kept = tokenizer().decode(answer.kept())
    return answer.text, kept, tokenizer().decode([t.token for t in answer.tokens]), deltas


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("The river runs\nand runs", ("\n",), "The river runs"),
        ("The river runs", ("ver",), "The ri"),
        ("The river runs", ("The",), ""),
        ("The river runs", ("zzz", "runs past"), "The river runs"),
        ("Each mill has a keeper", ("keeper", "mill has"), "Each "),
        ("grüße 你好 你坏", ("好",), "grüße 你"),
        ("aab aaab", ("aaab",), "aab "),
    ],
)
def test_an_answer_ends_before_its_stop_string(text: str, stops: tuple[str, ...], expected: str) -> None:
    shown, kept, tokens, deltas = run(text, stops)
    assert shown == kept == "".join(deltas) == expected
    assert tokens.startswith(expected)
