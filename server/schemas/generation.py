"""The fields that both completion endpoints take. Owns their ranges and which values can't be served."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from mnemosyne.engine.errors import RequestError
from mnemosyne.server.schemas.common import Input, SessionId

Ratio = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
MAX_CHOICES = 128
MAX_LOGPROBS = 20

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "min_tokens": (None, 0),
    "prompt_logprobs": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "truncate_prompt_tokens": (None,),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "return_progress": (None, False),
}
"""Known fields that aren't served, with the values under which they change nothing. Any other value is
refused."""

HARMLESS = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "prediction",
        "add_generation_prompt",
        "add_special_tokens",
        "skip_special_tokens",
        "priority",
        "request_id",
    }
)
"""Known fields that never change an answer here."""


class StreamOptions(Input):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Input):
    """What ``/v1/completions`` and ``/v1/chat/completions`` have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Ratio | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session_id: SessionId | None = None
    conversation: SessionId | dict[str, Any] | None = None
    learn: bool | None = None
    version: Annotated[int, Field(ge=0)] | None = None

    def refuse_unserved(self) -> None:
        """Raise RequestError for a known field whose value would change the answer and isn't served."""
        given = self.model_extra or {}
        for name, harmless in NO_EFFECT.items():
            if name in given and not any(_same(given[name], value) for value in harmless):
                raise RequestError(
                    f"{name}: this value isn't supported", param=name, code="unsupported_value"
                )

    def unknown_fields(self) -> list[str]:
        return [name for name in super().unknown_fields() if name not in NO_EFFECT and name not in HARMLESS]

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def learns(self) -> bool:
        return self.learn is not False

    @property
    def usage_in_stream(self) -> Literal["none", "last", "all"]:
        options = self.stream_options
        if options is None or not (options.include_usage or options.continuous_usage_stats):
            return "none"
        return "all" if options.continuous_usage_stats else "last"

    def biases(self, vocab_size: int) -> dict[int, float]:
        """``logit_bias`` by token id. Raises RequestError for a key that isn't one."""
        biases: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isdecimal() or int(key) >= vocab_size or not math.isfinite(value):
                raise RequestError(f"logit_bias: {key!r} isn't a token id of this model", param="logit_bias")
            biases[int(key)] = value
        return biases


def _same(given: Any, value: Any) -> bool:
    return type(given) is type(value) and given == value
