"""What routes ask for, as annotated dependencies. Owns the reading of headers; knows no route and no body."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import Depends, Header, Path, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from mnemosyne.engine.errors import UnknownModel
from mnemosyne.server.errors import UnsupportedMedia
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.schemas.common import Input
from mnemosyne.server.sessions.service import SessionService
from mnemosyne.server.sessions.views import Idempotency, SessionInfo

IGNORED_FIELDS = "X-Mnemosyne-Ignored-Fields"
ENTITY_TAG = r'^(\*|(W/)?"[0-9]{1,18}"|[0-9]{1,18})$'
KEY = "^[ -~]{1,255}$"
JSON_TYPE = re.compile(r"^application/(?:[\w.-]+\+)?json\s*(;.*)?$", re.IGNORECASE)

bearer = HTTPBearer(auto_error=False, description="An API key, where the server asks for one.")
"""Only describes the keys in the OpenAPI document; ``middleware.Authentication`` checks them."""


def get_runtime(request: Request) -> Runtime:
    return cast(Runtime, request.app.state.runtime)


def get_tenant(request: Request) -> str:
    return cast(str, request.scope["state"]["tenant"])


RuntimeDep = Annotated[Runtime, Depends(get_runtime)]
Tenant = Annotated[str, Depends(get_tenant)]


def get_service(runtime: RuntimeDep) -> SessionService:
    return runtime.service


ServiceDep = Annotated[SessionService, Depends(get_service)]


def needs_json(request: Request) -> None:
    """Refuse a body of another type by its name, not by what parsing made of it."""
    given = request.headers.get("content-type", "")
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if has_body and not JSON_TYPE.match(given):
        raise UnsupportedMedia(f"send the body as application/json, not as {given or 'no type'}")


def read_if_match(
    if_match: Annotated[
        str | None,
        Header(pattern=ENTITY_TAG, description="The ETag of the session's version that this is meant for."),
    ] = None,
) -> int | None:
    digits = "".join(filter(str.isdigit, if_match or ""))
    return int(digits) if digits else None


def read_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=KEY, description="A repeat under the same key gets the first answer, changes nothing."
        ),
    ] = None,
) -> str | None:
    return idempotency_key


IfMatch = Annotated[int | None, Depends(read_if_match)]
IdempotencyKey = Annotated[str | None, Depends(read_key)]
SessionPath = Annotated[str, Path(max_length=128)]
DocumentPath = Annotated[str, Path(max_length=128)]


def idempotency(request: Request, key: str | None, body: Any, about: str = "") -> Idempotency | None:
    """The key with the hash of what it was sent with: ``body`` as JSON, and ``about``, which names its
    session."""
    if key is None:
        return None
    route = f"{request.method} {getattr(request.scope.get('route'), 'path', request.url.path)}"
    content = json.dumps([about, body], sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return Idempotency(route=route, key=key, body_hash=hashlib.sha256(content).hexdigest())


def body_of(model: BaseModel, *leave_out: str) -> Any:
    return model.model_dump(mode="json", exclude_unset=True, exclude=set(leave_out))


def name_ignored(response: Response, body: Input) -> None:
    """Name the fields of a body that had no meaning in the answer's headers."""
    unknown = [quote(name, safe="") for name in body.unknown_fields()]
    if unknown:
        response.headers[IGNORED_FIELDS] = ", ".join(unknown)[:1024]


def check_model(runtime: Runtime, model: str | None) -> None:
    served = runtime.settings.served_model
    if model is not None and model != served:
        raise UnknownModel(f"there is no model {model!r} here, there is {served!r}", param="model")


def tag(response: Response, info: SessionInfo) -> None:
    """The headers of an answer that is one session."""
    response.headers["ETag"] = f'"{info.version}"'
    response.headers["X-Session-ID"] = info.id
