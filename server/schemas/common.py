"""Shapes that several routes share: the error envelope, usage, and what an answer says of its session."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mnemosyne.server.errors import CODES, STATUSES, TABLE

SessionId = Annotated[str, Field(max_length=128)]
Metadata = Annotated[dict[str, Any], Field(max_length=64)]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """What every failed request answers."""

    error: ErrorBody


class Input(BaseModel):
    """A request body. Fields that aren't known are kept, so that the answer can name them."""

    model_config = ConfigDict(extra="allow", strict=True)

    def unknown_fields(self) -> list[str]:
        """Names of the fields that had no meaning here, in the order of the body."""
        return list(self.model_extra or {})


class PromptDetails(BaseModel):
    cached_tokens: int = 0
    """Tokens of this request that the session had read before and that weren't learned again."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class SessionReport(BaseModel):
    """What a turn did to its session."""

    id: str
    version: int
    tokens_seen: int
    reused_tokens: int
    recomputed_tokens: int


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses=`` of a route: each status with the codes it may carry."""
    rows = [*TABLE.values(), *STATUSES.values(), *CODES.values()]
    return {
        status: {
            "model": ErrorEnvelope,
            "description": ", ".join(sorted({row.code for row in rows if row.status == status})),
        }
        for status in sorted({400, 401, 413, 429, 500, 503, *statuses})
    }
