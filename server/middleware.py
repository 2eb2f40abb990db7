"""What every request passes. Owns request ids, keys, and the size of bodies; knows no route's meaning.

Pure ASGI: a response's stream and a client's disconnection pass through untouched.
"""

from __future__ import annotations

import re
import time
import uuid

from fastapi.requests import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnemosyne.server.auth import KeyRing
from mnemosyne.server.errors import STATUSES, BodyTooLarge, Unauthenticated, envelope, on_failure

UPLOAD = re.compile(r"^/v1/sessions/[^/]+/(documents/[^/]+|state)$")
OPEN = re.compile(r"^/health(/live|/ready)?$")
REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")


class RequestIdentity:
    """Echoes or makes ``X-Request-Id``, adds ``openai-processing-ms`` (time to the headers), and answers for
    bugs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.match(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        began, started = time.perf_counter(), False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - began) * 1000))
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:
            if started:
                raise
            response = await on_failure(Request(scope), error)
            await response(scope, receive, with_headers)


class BodyLimit:
    """Refuses a body that is too large, by its announced length or by counting what comes."""

    def __init__(self, app: ASGIApp, request_bytes: int, upload_bytes: int) -> None:
        self.app, self.request_bytes, self.upload_bytes = app, request_bytes, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.upload_bytes if UPLOAD.match(scope["path"]) else self.request_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            body = envelope(str(BodyTooLarge(limit).detail), STATUSES[413])
            await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                raise BodyTooLarge(limit)
            return message

        await self.app(scope, counted, send)


class Authentication:
    """Asks for a key before anything of a request is read; notes its tenant. The health routes are open."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not OPEN.match(scope["path"]):
            try:
                tenant = self.keys.tenant(Headers(scope=scope).get("authorization"))
            except Unauthenticated as error:
                response = await on_failure(Request(scope), error)
                await response(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)
