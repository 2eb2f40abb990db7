"""What the server may ask of an engine, wherever it runs. Owns the protocol; knows no socket, thread or
model.

``client.EngineClient`` (a process of its own), ``inline.InlineEngine`` (a thread of this process) and
``fleet.Fleet`` (several of them as one) satisfy it. All methods belong to the event loop that ``start`` ran
on; none may be called from another thread.

Handles. The caller makes handles up and must make a new one for each result: a handle is bound once and never
again (binding a bound one fails with EngineError; ``INITIAL`` is always bound). Requests take effect in the
order in which they were sent, and ``base`` may be the ``result`` of a request that was sent before and hasn't
finished: the later one waits, and fails as the earlier one failed. A request keeps what it needs: its base
may be released right after it was sent. All of them send when they are first awaited, ``generate`` at the
first ``anext``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from mnemosyne.engine.messages import Advanced, EngineInfo, Finished, Loaded, Progress, Sampling, Token
from mnemosyne.engine.pyramid import Pyramid, Values


class EngineLike(Protocol):
    """An engine as the server sees it. Failures are raised as classes of ``engine.errors``:

    - ``QueueFull`` when too much work is queued (nothing was taken; retry later)
    - ``UnknownHandle`` when a base isn't bound: never was, was released, or was lost with an engine that died
    - ``NotFinite`` when a number stopped being finite; the base is intact, ``result`` isn't bound
    - ``ContextTooLong`` when one request has more than ``info.max_queued_tokens`` tokens
    - ``RequestError`` for what can't be done (nothing read and an empty prompt: ``param="prompt"``; a token
      id outside the vocabulary)
    - ``EngineUnavailable`` when the engine is gone or not ready; the handles that it held are then lost
    - ``Cancelled`` when the request that makes the base was cancelled
    - ``SnapshotError`` subclasses from ``load``
    """

    @property
    def info(self) -> EngineInfo:
        """What the engine said when it became ready. Raises EngineUnavailable before ``start``."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a call made now would reach a running engine."""
        ...

    @property
    def incarnation(self) -> int:
        """0 before the first start, then 1, and one more each time that an engine which died is ready
        again."""
        ...

    def on_lost(self, hook: Callable[[], None]) -> None:
        """Call ``hook`` on the event loop each time handles were lost with an engine that ended: ``holds``
        tells which.

        The calls that were pending there fail with EngineUnavailable."""
        ...

    def holds(self, handle: str) -> bool:
        """Whether ``handle`` is bound, or a running request will bind it."""
        ...

    async def start(self) -> None:
        """Return when the engine is ready. Raises EngineUnavailable with the reason if it can't be
        started."""
        ...

    async def close(self) -> None:
        """Stop the engine; pending calls raise EngineUnavailable. May be called twice."""
        ...

    async def advance(
        self,
        base: str,
        result: str,
        tokens: tuple[int, ...],
        kinds: bytes | None = None,
        tenant: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Advanced:
        """Learn ``tokens`` on top of ``base`` and bind ``result``; ``kinds`` is one byte per token, None all
        INPUT.

        ``on_progress`` is called on the event loop after each step that committed chunks, in order, before
        this returns. An empty ``tokens`` binds ``result`` to the base's state. Cancelling the awaiting task
        cancels the request at the engine's next step. ``result`` may then have been bound already: release
        it."""
        ...

    def generate(
        self,
        base: str,
        result: str | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        tenant: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> AsyncGenerator[Token | Finished, None]:
        """Read ``prompt`` on top of ``base``, yield each Token as it is emitted, and at last one Finished.

        ``result`` is bound to base + prompt + emitted tokens before Finished is yielded; None keeps nothing.
        Closing the generator early (``aclose``, a cancelled task) cancels the request: ``result`` may then
        have been bound already, so release it. A stop id is neither yielded nor part of the result.
        ``on_progress`` is called for the chunks that the prompt and the answer committed, its ``tokens_done``
        counts both."""
        ...

    async def export(self, handle: str) -> bytes:
        """The state of ``handle`` as bytes that ``load`` takes."""
        ...

    async def load(self, handle: str, data: bytes) -> Loaded:
        """Bind ``handle`` to the state in ``data``. Raises SnapshotCorrupt or StateIncompatible."""
        ...

    async def trace(self, handle: str) -> Pyramid:
        """What the chunks that ``handle`` has committed did to the memory."""
        ...

    async def trace_tokens(self, base: str, tokens: tuple[int, ...], tenant: str = "") -> Values:
        """Surprise and momentary surprise of each of ``tokens`` read on top of ``base``: means over heads,
        `[tokens, layers, 2]`. Binds nothing.

        ``RequestError`` unless they end where a chunk does and are 1 to ``messages.MAX_TRACED_TOKENS``."""
        ...

    def release(self, handle: str) -> None:
        """Forget ``handle``; ignored if unknown, and if the engine is gone. Requests sent before still use
        it.

        A handle that a running request will bind is dropped as soon as it is bound, after the requests that
        were sent before this have got it."""
        ...

    async def stats(self) -> dict[str, float]:
        """Counters and gauges since this incarnation began, over all devices; ``engine.counters`` names
        them."""
        ...

    async def device_stats(self) -> dict[str, dict[str, float]]:
        """The same by device, and of each whether it is ``up`` and its ``restarts_total``; one that is away
        has no more than these."""
        ...
