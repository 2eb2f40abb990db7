"""Documents up to the moment they are whole: announced, received, checked. Reading them is the absorber's
matter.

Every byte that is acknowledged is in the store's spool. A document is refused as soon as it is certain that
it is wrong; as it is read only once it is whole and right, the session is then what it was before it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import numpy as np

from mnemosyne.engine.errors import (
    DocumentNotFound,
    DocumentRejected,
    MnemosyneError,
    OffsetMismatch,
    RequestError,
)
from mnemosyne.server.sessions import records
from mnemosyne.server.sessions.absorber import Absorber, ended
from mnemosyne.server.sessions.core import Core, check_match
from mnemosyne.server.sessions.idempotency import first_answer, reply
from mnemosyne.server.sessions.inspection import Inspector
from mnemosyne.server.sessions.leases import Held
from mnemosyne.server.sessions.lineage import Document
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.records import DocumentCreated, DocumentReceived
from mnemosyne.server.sessions.views import DocumentInfo, Idempotency, to_json

_READ = 1 << 20


class Documents:
    def __init__(self, core: Core, absorber: Absorber) -> None:
        self._core, self._absorber = core, absorber

    async def create(
        self,
        live: Live,
        *,
        name: str,
        content_type: str,
        length: int | None,
        sha256: str | None,
        text: str | None,
        tokens: tuple[int, ...] | None,
        if_match: int | None,
        idempotency: Idempotency | None,
    ) -> DocumentInfo:
        """See ``SessionService.create_document``. One given whole and wrong is refused and leaves no
        trace."""
        self._core.admit()
        self._core.check_weights(live.session)
        whole = _whole(text, tokens, self._core.tokenizer.vocab_size)
        self._check_size(length if whole is None else len(whole))
        tenant = live.session.created.tenant
        async with self._core.writing(live) as held, live.uploading:
            if (payload := await first_answer(live, tenant, idempotency)) is not None:
                return DocumentInfo(**payload)
            check_match(live, if_match)
            document = Document(
                id=f"doc_{secrets.token_hex(12)}",
                name=name,
                content_type=content_type,
                form="tokens" if tokens is not None else "text",
                length=length,
                sha256=sha256,
                created_at=time.time(),
            )
            if whole is not None:
                inspector = Inspector(document)
                await asyncio.to_thread(inspector.feed, whole)
                inspector.finish()
                await asyncio.to_thread(
                    self._core.store.spool_append, live.id, document.id, 0, whole, held.fence
                )
            info = _info(document, "receiving" if whole is None else "queued", len(whole or b""))
            new: list[records.Record] = [
                DocumentCreated(
                    at=document.created_at,
                    document=document.id,
                    name=name,
                    content_type=content_type,
                    form=document.form,
                    length=length,
                    sha256=sha256,
                    reply=reply(tenant, idempotency, to_json(info)),
                )
            ]
            if whole is not None:
                new.append(DocumentReceived(at=time.time(), document=document.id, nbytes=len(whole)))
            await live.append(new, held.fence)
        live.events.add("document", {"document": document.id, "status": info.status})
        self._absorber.wake(live)
        return info

    async def append(
        self, live: Live, document_id: str, *, offset: int, data: bytes, complete: bool
    ) -> DocumentInfo:
        """See ``SessionService.append_document``."""
        self._core.admit()
        live.session.document(document_id)
        async with self._core.writing(live) as held, live.uploading:
            document = live.session.document(document_id)
            if document.status != "receiving":
                return await self._append_to_whole(live, document, offset, data, complete)
            length = await asyncio.to_thread(self._core.store.spool_length, live.id, document_id)
            if offset != length:
                raise OffsetMismatch(f"the upload goes on at byte {length}, not {offset}", offset=length)
            self._check_size(length + len(data))
            try:
                inspector = await self._inspector(live, document, length)
                await asyncio.to_thread(inspector.feed, data)
                if complete:
                    inspector.finish()
                if data:
                    length = await asyncio.to_thread(
                        self._core.store.spool_append, live.id, document_id, offset, data, held.fence
                    )
            except BaseException as error:
                live.inspectors.pop(document_id, None)  # it has seen bytes that may not be in the spool
                if isinstance(error, DocumentRejected):
                    await self._end(live, held, document, "rejected", error)
                raise
            if complete:
                await live.append(
                    [DocumentReceived(at=time.time(), document=document_id, nbytes=length)], held.fence
                )
                live.inspectors.pop(document_id, None)
        if complete:
            live.events.add("document", {"document": document_id, "status": "queued"})
            self._absorber.wake(live)
        return await self.info(live, live.session.document(document_id))

    async def cancel(self, live: Live, document: Document) -> DocumentInfo:
        """See ``SessionService.cancel_document``."""
        if document.status == "absorbed":
            raise RequestError(
                f"document {document.id} was read as version {document.version}; rewind to before it instead",
                param="document_id",
            )
        if not document.ended:
            async with self._absorber.stopped(live), self._core.writing(live) as held, live.uploading:
                document = live.session.document(document.id)
                if not document.ended:
                    await self._end(live, held, document, "cancelled", None)
                    await self._core.states.keep_only(live, live.session.point())
        return await self.info(live, live.session.document(document.id))

    async def all(self, live: Live) -> list[DocumentInfo]:
        return [await self.info(live, document) for document in live.session.documents.values()]

    async def info(self, live: Live, document: Document) -> DocumentInfo:
        received = document.nbytes or 0
        if document.status == "receiving":
            received = await asyncio.to_thread(self._core.store.spool_length, live.id, document.id)
        return _info(document, document.status, received)

    async def _append_to_whole(
        self, live: Live, document: Document, offset: int, data: bytes, complete: bool
    ) -> DocumentInfo:
        """The end of an upload that the client didn't see acknowledged is acknowledged again; nothing else
        fits."""
        if document.status == "cancelled":
            raise DocumentNotFound("the document was cancelled", document=document.id)
        if document.status == "rejected":
            error = document.error or {}
            raise DocumentRejected(
                str(error.get("message", "the document was rejected")), document=document.id
            )
        assert document.nbytes is not None
        if not (complete and not data and offset == document.nbytes):
            raise OffsetMismatch("the document is whole", offset=document.nbytes)
        return await self.info(live, document)

    async def _inspector(self, live: Live, document: Document, length: int) -> Inspector:
        """The checks of what was received so far; made anew from the spool after a restart."""
        inspector = live.inspectors.get(document.id)
        if inspector is None or inspector.offset != length:
            inspector = Inspector(document)
            while inspector.offset < length:
                wanted = min(_READ, length - inspector.offset)
                data = await asyncio.to_thread(
                    self._core.store.spool_read, live.id, document.id, inspector.offset, wanted
                )
                await asyncio.to_thread(inspector.feed, data)
            live.inspectors[document.id] = inspector
        return inspector

    async def _end(
        self, live: Live, held: Held, document: Document, status: str, error: MnemosyneError | None
    ) -> None:
        await live.append([ended(document, status, error)], held.fence)
        live.inspectors.pop(document.id, None)
        await asyncio.to_thread(self._core.store.spool_delete, live.id, document.id, held.fence)
        live.events.add("document", {"document": document.id, "status": status})

    def _check_size(self, nbytes: int | None) -> None:
        limit = self._core.settings.max_document_bytes
        if nbytes is not None and nbytes > limit:
            raise RequestError(
                f"a document may have {limit} bytes", param="length", code="document_too_large"
            )


def _whole(text: str | None, tokens: tuple[int, ...] | None, vocab_size: int) -> bytes | None:
    """The bytes of a document that was given at once. Raises RequestError for what can't be one."""
    if text is not None and tokens is not None:
        raise RequestError("a document has text or tokens, not both", param="tokens")
    if tokens is not None:
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise RequestError(f"token ids must be 0 to {vocab_size - 1}", param="tokens")
        return np.asarray(tokens, dtype="<u4").tobytes()
    if text is None:
        return None
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text isn't valid Unicode: {error.reason}", param="text") from error


def _info(document: Document, status: Any, received: int) -> DocumentInfo:
    return DocumentInfo(
        id=document.id,
        name=document.name,
        content_type=document.content_type,
        status=status,
        length=document.length,
        bytes_received=received,
        bytes_absorbed=document.absorbed_bytes,
        tokens_absorbed=document.absorbed_tokens,
        version=document.version,
        error=document.error,
        created_at=document.created_at,
    )
