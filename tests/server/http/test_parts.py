"""The pure parts: resent histories, the chat template, the token rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mnemosyne.engine.errors import ConfigError, QuotaExceeded, RequestError
from mnemosyne.server.history import Turn, past_turns, split_resent
from mnemosyne.server.prompt import ChatTemplate
from mnemosyne.server.quotas import TokenRate

from .scripted import PROMPT


@pytest.fixture
def template(tmp_path: Path) -> ChatTemplate:
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(PROMPT))
    return ChatTemplate.from_file(path)


TURNS = [Turn("be brief\nQ: one\nA:", " 1"), Turn("Q: two\nA:", " 2"), Turn("Q: three\nA:", " 3")]


def test_the_resent_part_ends_with_the_newest_answer(template: ChatTemplate) -> None:
    whole = [
        ("system", "be brief"), ("user", "one"), ("assistant", "1"),
        ("user", "two"), ("assistant", "2 "), ("user", "three"), ("assistant", "3"), ("user", "four"),
    ]  # fmt: skip
    assert split_resent(whole, TURNS, template) == 7
    trimmed = [whole[0], *whole[3:]]  # a client that dropped the oldest turn but kept its system message
    assert split_resent(trimmed, TURNS, template) == 5
    assert split_resent([("user", "four")], TURNS, template) == 0


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "two"), ("assistant", "2"), ("user", "next")],  # not the newest
        [("user", "three"), ("assistant", "4"), ("user", "next")],
        [("user", "tree"), ("assistant", "3"), ("user", "next")],
        [("user", "zero"), ("assistant", "0"), *[("user", "x"), ("assistant", "y")] * 3, ("user", "next")],
    ],
)
def test_another_history_is_refused(template: ChatTemplate, messages: list[tuple[str, str]]) -> None:
    with pytest.raises(RequestError) as refused:
        split_resent(messages, TURNS, template)
    assert refused.value.attributes["code"] == "history_mismatch"


def test_turns_are_found_between_documents() -> None:
    transcript = [
        {"kind": "document", "version": 1, "text": "d"},
        {"kind": "input", "version": 2, "text": "Q:"},
        {"kind": "generated", "version": 2, "text": " a"},
        {"kind": "input", "version": 2, "text": "\n"},
        {"kind": "document", "version": 3, "text": "e"},
    ]
    assert past_turns(transcript) == [Turn("Q:", " a")]


@pytest.mark.parametrize("change", [{"user": "no slot"}, {"system": "{content}{content}"}, {"stop": 3}])
def test_an_incomplete_template_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps({**PROMPT, **change}))
    with pytest.raises(ConfigError, match=r"prompt\.json"):
        ChatTemplate.from_file(path)


def test_a_rate_lets_a_large_request_pass_and_then_waits_for_it() -> None:
    now = [0.0]
    rate = TokenRate(60, clock=lambda: now[0])
    rate.admit("a")
    rate.charge("a", 120)
    with pytest.raises(QuotaExceeded) as refused:
        rate.admit("a")
    assert refused.value.attributes["retry_after"] == pytest.approx(61)
    rate.admit("b")
    now[0] = 62.0
    rate.admit("a")
    assert rate.remaining("a") == 2 and rate.used("a") == 120
