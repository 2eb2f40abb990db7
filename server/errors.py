"""Failures as HTTP. Owns the one table from error classes to (status, type, code); knows no route."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mnemosyne.engine import errors as e
from mnemosyne.server.openapi import allowed_methods

log = logging.getLogger("mnemosyne.server")
RETRY_AFTER_SECONDS = 1


class Answer(NamedTuple):
    """How one class of failure is told to a client."""

    status: int
    type: str
    code: str


class Unauthenticated(e.MnemosyneError): ...


class Draining(e.MnemosyneError):
    retryable = True


class UnsupportedMedia(e.RequestError): ...


class BodyTooLarge(HTTPException):
    """An HTTPException, because FastAPI turns any other error raised while it reads a body into a 400."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is larger than the limit of {limit} bytes")


TABLE: dict[type[Exception], Answer] = {
    e.RequestError: Answer(400, "invalid_request_error", "invalid_request"),
    e.UnknownModel: Answer(404, "not_found_error", "model_not_found"),
    e.ContextTooLong: Answer(400, "invalid_request_error", "context_length_exceeded"),
    UnsupportedMedia: Answer(415, "invalid_request_error", "unsupported_media_type"),
    Unauthenticated: Answer(401, "authentication_error", "invalid_api_key"),
    e.QueueFull: Answer(429, "overloaded_error", "queue_full"),
    e.QuotaExceeded: Answer(429, "rate_limit_error", "quota_exceeded"),
    e.StatesFull: Answer(503, "unavailable_error", "states_full"),
    e.DeviceFull: Answer(503, "unavailable_error", "device_full"),
    e.CapacityError: Answer(429, "overloaded_error", "overloaded"),
    e.SessionNotFound: Answer(404, "not_found_error", "session_not_found"),
    e.VersionNotFound: Answer(404, "not_found_error", "version_not_found"),
    e.DocumentNotFound: Answer(404, "not_found_error", "document_not_found"),
    e.SessionBusy: Answer(409, "conflict_error", "session_busy"),
    e.OffsetMismatch: Answer(409, "conflict_error", "offset_mismatch"),
    e.VersionMismatch: Answer(412, "conflict_error", "version_mismatch"),
    e.DocumentRejected: Answer(400, "invalid_request_error", "document_rejected"),
    e.SessionError: Answer(409, "conflict_error", "session_error"),
    e.IdempotencyMismatch: Answer(422, "invalid_request_error", "idempotency_mismatch"),
    e.IdempotencyRunning: Answer(409, "conflict_error", "idempotency_running"),
    e.SnapshotUnsupported: Answer(400, "invalid_request_error", "snapshot_unsupported"),
    e.StateIncompatible: Answer(422, "invalid_request_error", "state_incompatible"),
    e.SnapshotError: Answer(400, "invalid_request_error", "snapshot_corrupt"),
    e.LeaseLost: Answer(503, "unavailable_error", "lease_lost"),
    e.StoreError: Answer(503, "unavailable_error", "store_unavailable"),
    Draining: Answer(503, "unavailable_error", "draining"),
    e.EngineUnavailable: Answer(503, "unavailable_error", "engine_unavailable"),
    e.UnknownHandle: Answer(503, "unavailable_error", "engine_restarted"),
    e.NotFinite: Answer(500, "server_error", "not_finite"),
    e.Cancelled: Answer(409, "conflict_error", "cancelled"),
    Exception: Answer(500, "server_error", "internal_error"),
}
"""A class that isn't here has the answer of its nearest base."""

CODES: dict[str, Answer] = {
    "document_too_large": Answer(413, "invalid_request_error", "document_too_large"),
}
"""Failures whose attribute ``code`` says more than their class, the status too."""

STATUSES: dict[int, Answer] = {
    400: Answer(400, "invalid_request_error", "invalid_request"),
    404: Answer(404, "not_found_error", "route_not_found"),
    405: Answer(405, "invalid_request_error", "method_not_allowed"),
    413: Answer(413, "invalid_request_error", "body_too_large"),
    415: TABLE[UnsupportedMedia],
}
"""What Starlette and FastAPI raise by status."""

GENERIC = "The server made a mistake. Its log has the details under this request's X-Request-Id."


def answer_for(error: BaseException) -> Answer:
    """The row of the table for ``error``; its attribute ``code``, where set, is more exact than the row's."""
    for base in type(error).__mro__:
        if base in TABLE:
            row = TABLE[base]
            code = error.attributes.get("code") if isinstance(error, e.MnemosyneError) else None
            return CODES.get(code, row._replace(code=code)) if isinstance(code, str) else row
    return TABLE[Exception]


def envelope(message: str, answer: Answer, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": answer.type, "param": param, "code": answer.code}}


def describe(error: BaseException) -> tuple[Answer, dict[str, Any], dict[str, str]]:
    """(row, envelope, headers) for a failure; an unforeseen one is told in general words alone."""
    answer = answer_for(error)
    known = isinstance(error, e.MnemosyneError) and answer is not TABLE[Exception]
    message = error.message if known and isinstance(error, e.MnemosyneError) else GENERIC
    attributes: Mapping[str, object] = error.attributes if isinstance(error, e.MnemosyneError) else {}
    param = error.param if isinstance(error, e.MnemosyneError) else None
    return answer, envelope(message, answer, param), _headers(answer, attributes)


def _headers(answer: Answer, attributes: Mapping[str, object]) -> dict[str, str]:
    headers: dict[str, str] = {}
    if answer.status in (429, 503) or answer.code in ("session_busy", "idempotency_running"):
        after = attributes.get("retry_after", RETRY_AFTER_SECONDS)
        headers["Retry-After"] = str(max(1, round(after))) if isinstance(after, int | float) else "1"
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if answer.code == "offset_mismatch" and isinstance(attributes.get("offset"), int):
        headers["Upload-Offset"] = str(attributes["offset"])
    if answer.status == 412 and isinstance(attributes.get("version"), int):
        headers["ETag"] = f'"{attributes["version"]}"'
    return headers


def _log(request: Request, error: BaseException, answer: Answer) -> None:
    if answer.status >= 500:
        request_id = request.scope.get("state", {}).get("request_id", "")
        unforeseen = answer.status == 500
        log.error("request %s failed: %s", request_id, error, exc_info=error if unforeseen else None)


async def on_failure(request: Request, error: Exception) -> JSONResponse:
    answer, body, headers = describe(error)
    _log(request, error, answer)
    return JSONResponse(body, answer.status, headers)


async def on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = STATUSES.get(error.status_code, Answer(error.status_code, "invalid_request_error", "http_error"))
    message = str(error.detail)
    if answer.status == 404:
        message = f"there is no route {request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if answer.status == 405:
        message = f"{request.url.path} doesn't take {request.method}"
        headers["Allow"] = ", ".join(allowed_methods(request.app, request.url.path))
    return JSONResponse(envelope(message, answer), answer.status, headers)


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own 422 as a 400 that names the first wrong field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        param, message = None, f"the body isn't JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    else:
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return JSONResponse(envelope(message, STATUSES[400], param), 400)


def install(app: FastAPI) -> None:
    """Make every foreseen failure of ``app`` leave in the envelope; ``RequestIdentity`` sees to the
    others."""
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(e.MnemosyneError, on_failure)
