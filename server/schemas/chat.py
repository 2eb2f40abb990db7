"""Bodies of ``/v1/chat/completions``, field by field as OpenAI has them, with our extensions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from mnemosyne.engine.errors import RequestError
from mnemosyne.server.schemas.common import Input, SessionReport, Usage
from mnemosyne.server.schemas.generation import MAX_LOGPROBS, GenerationRequest

Role = Literal["system", "developer", "user", "assistant"]


class ContentPart(Input):
    type: str
    text: str | None = None


class ChatMessage(Input):
    role: Role
    content: str | list[ContentPart] | None = None

    def text(self, index: int) -> str:
        """The message as text. Raises RequestError for a part that isn't text, and for a message of a
        tool."""
        param = f"messages.{index}"
        if (self.model_extra or {}).get("tool_calls"):
            raise RequestError("tools aren't supported", param=param, code="unsupported_value")
        if self.content is None:
            raise RequestError("a message needs content", param=f"{param}.content")
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.type not in ("text", "input_text", "output_text") or part.text is None:
                raise RequestError(
                    f"a part of type {part.type!r} isn't supported: send text",
                    param=f"{param}.content",
                    code="unsupported_value",
                )
        return "".join(part.text or "" for part in self.content)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    history: Literal["new", "auto"] | None = None

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    session: SessionReport | None = None
