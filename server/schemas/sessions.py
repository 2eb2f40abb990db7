"""Bodies of the session and document routes. What they answer are the session service's own views."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from mnemosyne.server.schemas.common import Input, Metadata
from mnemosyne.server.sessions.views import DocumentInfo, SessionInfo, VersionInfo

Seconds = Annotated[float, Field(ge=1, le=10 * 366 * 86_400)]
Version = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class CreateSession(Input):
    model: str | None = None
    metadata: Metadata | None = None
    ttl_seconds: Seconds | None = None
    retain_input: bool = True


class PatchSession(Input):
    """Only what is given changes; ``ttl_seconds: null`` removes the expiry."""

    metadata: Metadata | None = None
    ttl_seconds: Seconds | None = None

    @property
    def clears_expiry(self) -> bool:
        return "ttl_seconds" in self.model_fields_set and self.ttl_seconds is None


class NameVersion(Input):
    name: Name


class Fork(Input):
    version: Version | None = None


class Rewind(Input):
    """Where to go back to: exactly one of the two."""

    version: Version | None = None
    tokens_seen: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Rewind:
        if (self.version is None) == (self.tokens_seen is None):
            raise ValueError("give either version or tokens_seen")
        return self


class CreateDocument(Input):
    name: Name
    content_type: Annotated[str, Field(min_length=1, max_length=128)] = "text/plain"
    length: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    text: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None

    @model_validator(mode="after")
    def _one(self) -> CreateDocument:
        if self.text is not None and self.tokens is not None:
            raise ValueError("give text or tokens, not both")
        return self


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SessionInfo]
    has_more: bool


class VersionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VersionInfo]


class DocumentList(BaseModel):
    object: Literal["list"] = "list"
    data: list[DocumentInfo]


class TranscriptList(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Cancelled(BaseModel):
    cancelled: int
    """How many turns and documents were stopped."""
