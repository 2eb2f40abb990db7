"""Documents of a session: announce, upload in pieces that can be resumed, watch, cancel."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response

from mnemosyne.engine.errors import RequestError
from mnemosyne.server.deps import (
    DocumentPath,
    IdempotencyKey,
    IfMatch,
    RuntimeDep,
    ServiceDep,
    SessionPath,
    Tenant,
    body_of,
    idempotency,
    name_ignored,
    needs_json,
)
from mnemosyne.server.errors import UnsupportedMedia
from mnemosyne.server.quotas import BYTES_PER_TOKEN
from mnemosyne.server.schemas.common import failures
from mnemosyne.server.schemas.sessions import CreateDocument, DocumentList
from mnemosyne.server.sessions.views import DocumentInfo

PIECE = 1 << 20
"""Bytes of an upload that are made durable together."""
TEXT_TYPE = re.compile(
    r"^(text/[\w.+-]+|application/([\w.-]+\+)?(json|xml|yaml|x-yaml|toml|x-ndjson|jsonl|javascript|octet-stream"
    r"|sql|x-sh|x-python|x-tex|rtf))\s*(;.*)?$",
    re.IGNORECASE,
)
UPLOAD_TYPE = re.compile(
    r"^(text/[\w.+-]+|application/(octet-stream|partial-upload))\s*(;.*)?$", re.IGNORECASE
)

router = APIRouter(prefix="/v1/sessions/{session_id}/documents", tags=["documents"])
READ = failures(404)


def read_offset(upload_offset: Annotated[str, Header(pattern=r"^\d{1,15}$")]) -> int:
    return int(upload_offset)


def read_complete(upload_complete: Annotated[str, Header(pattern=r"^\?[01]$")] = "?0") -> bool:
    return upload_complete == "?1"


@router.post(
    "",
    response_model=DocumentInfo,
    status_code=201,
    responses=failures(404, 409, 412, 415, 422),
    dependencies=[Depends(needs_json)],
)
async def create_document(
    request: Request,
    response: Response,
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    body: CreateDocument,
    if_match: IfMatch,
    key: IdempotencyKey,
) -> DocumentInfo:
    """Announce a document to upload, or send a short one whole as ``text`` or ``tokens``."""
    if not TEXT_TYPE.match(body.content_type):
        raise UnsupportedMedia(f"a document must be text, not {body.content_type}", param="content_type")
    text = _encoded(body.text)
    runtime.rate.admit(tenant)
    await runtime.limits.admit_bytes(tenant, body.length or len(text))
    info = await service.create_document(
        tenant,
        session_id,
        name=body.name,
        content_type=body.content_type,
        length=body.length,
        sha256=body.sha256.lower() if body.sha256 else None,
        text=body.text,
        tokens=tuple(body.tokens) if body.tokens is not None else None,
        if_match=if_match,
        idempotency=idempotency(request, key, body_of(body), session_id),
    )
    runtime.rate.charge(tenant, len(body.tokens or ()) + len(text) // BYTES_PER_TOKEN)
    name_ignored(response, body)
    response.headers["Location"] = f"/v1/sessions/{session_id}/documents/{info.id}"
    _progress(response, info)
    return info


@router.get("", response_model=DocumentList, responses=READ)
async def list_documents(service: ServiceDep, tenant: Tenant, session_id: SessionPath) -> DocumentList:
    """A session's documents, in the order in which they are read."""
    return DocumentList(data=await service.documents(tenant, session_id))


@router.get("/{document_id}", response_model=DocumentInfo, responses=READ)
async def get_document(
    response: Response,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    document_id: DocumentPath,
) -> DocumentInfo:
    """How far a document has come."""
    info = await service.document(tenant, session_id, document_id)
    _progress(response, info)
    return info


@router.head("/{document_id}", response_class=Response, responses=READ)
async def head_document(
    service: ServiceDep, tenant: Tenant, session_id: SessionPath, document_id: DocumentPath
) -> Response:
    """Where an upload goes on: ``Upload-Offset``."""
    response = Response(headers={"Cache-Control": "no-store"})
    _progress(response, await service.document(tenant, session_id, document_id))
    return response


@router.patch(
    "/{document_id}",
    status_code=204,
    responses=failures(404, 409, 415),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_document(
    request: Request,
    runtime: RuntimeDep,
    service: ServiceDep,
    tenant: Tenant,
    session_id: SessionPath,
    document_id: DocumentPath,
    offset: Annotated[int, Depends(read_offset)],
    complete: Annotated[bool, Depends(read_complete)],
) -> Response:
    """Add bytes at ``Upload-Offset``; ``Upload-Complete: ?1`` with the last. The offset that comes back is
    durable."""
    content_type = request.headers.get("content-type", "application/octet-stream")
    if not UPLOAD_TYPE.match(content_type):
        raise UnsupportedMedia(f"send the bytes as application/octet-stream, not as {content_type}")
    runtime.rate.admit(tenant)
    begin, piece = offset, bytearray()

    async def save(data: bytes, last: bool) -> DocumentInfo:
        return await service.append_document(
            tenant, session_id, document_id, offset=offset, data=data, complete=last
        )

    try:
        async for data in request.stream():
            piece += data
            while len(piece) > PIECE:
                await runtime.limits.admit_bytes(tenant, PIECE)
                offset = (await save(bytes(piece[:PIECE]), False)).bytes_received
                del piece[:PIECE]
        await runtime.limits.admit_bytes(tenant, len(piece))
        info = await save(bytes(piece), complete)
        offset = info.bytes_received
    finally:
        runtime.rate.charge(tenant, (offset - begin) // BYTES_PER_TOKEN)
    response = Response(status_code=204)
    _progress(response, info)
    return response


@router.delete("/{document_id}", response_model=DocumentInfo, responses=failures(404, 409))
async def cancel_document(
    service: ServiceDep, tenant: Tenant, session_id: SessionPath, document_id: DocumentPath
) -> DocumentInfo:
    """Stop and forget a document that isn't absorbed yet."""
    return await service.cancel_document(tenant, session_id, document_id)


def _encoded(text: str | None) -> bytes:
    try:
        return (text or "").encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text isn't valid Unicode: {error.reason}", param="text") from error


def _progress(response: Response, info: DocumentInfo) -> None:
    response.headers["Upload-Offset"] = str(info.bytes_received)
    response.headers["Upload-Complete"] = "?0" if info.status == "receiving" else "?1"
    if info.length is not None:
        response.headers["Upload-Length"] = str(info.length)
