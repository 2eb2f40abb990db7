"""What the server says of itself, its models, its tokenizer and a tenant's usage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from mnemosyne.server.schemas.common import Input


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mnemosyne"
    root: str
    parent: None = None
    max_model_len: int
    """Tokens that one request may bring and ask for; what a session has read has no limit."""
    fingerprint: str
    parameters: int
    state_bytes: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Input):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Input):
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    model: str | None = None


class Detokenized(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok", "loading", "shutting_down", "failed", "unavailable"]
    detail: str | None = None


class VersionReport(BaseModel):
    version: str


class TenantUsage(BaseModel):
    """What a tenant uses, and its limits (null: none). Tokens are this server process's own count."""

    tenant: str
    sessions: int
    max_sessions: int | None
    stored_bytes: int
    max_stored_bytes: int | None
    tokens: int
    tokens_per_minute: int | None
    tokens_remaining: int | None
