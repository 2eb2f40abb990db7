"""What a session's reading did to its memory: the trace of a version, as finely as it is kept or asked for.

Whole chunks come from the state's pyramid. Values per token are computed again from the input log, on top of
the nearest state before them; text is taken from there. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnemosyne.engine.errors import RequestError, SnapshotCorrupt, VersionNotFound
from mnemosyne.engine.messages import MAX_TRACED_TOKENS
from mnemosyne.engine.pyramid import FIELDS, LEVELS, overall
from mnemosyne.server.sessions.core import Core
from mnemosyne.server.sessions.live import Live
from mnemosyne.server.sessions.paths import Segment, cut, segments
from mnemosyne.server.sessions.records import Point
from mnemosyne.server.sessions.recovery import tokens_of
from mnemosyne.server.sessions.views import SurpriseTrace, TracePoint

USUAL_POINTS = 512
"""What a range is divided into where no resolution is asked for: about as many, or fewer."""
MAX_POINTS = 4096
MAX_TEXT_TOKENS = 1 << 16
"""Of one answer's points together, where their text is asked for."""
TEXT, PER_TOKEN = "text is taken", "values per token are computed"
"""What is done with the input, for those who ask where it isn't kept."""


class Surprise:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def read(
        self,
        live: Live,
        first: int,
        last: int | None,
        resolution: int | None,
        version: int | None,
        text: bool,
    ) -> SurpriseTrace:
        """See ``SessionService.surprise``."""
        self._core.admit()
        self._core.check_weights(live.session)
        session, chunk = live.session, int(self._core.engine.info.config["chunk"])
        home = session.newest_commit if version is None else session.point(version)
        last = home.tokens if last is None else min(last, home.tokens)
        if first > last:
            raise RequestError(
                f"from is {first}, and the range ends at {last} of {home.tokens} tokens", param="from"
            )
        if resolution is None:
            resolution = chunk
            while last - first > USUAL_POINTS * resolution:
                resolution *= 2
        if text:
            _check_retained(live, TEXT, "text")
            _check_length(last - first)
        if last - first > MAX_POINTS * resolution:
            raise RequestError(
                f"{last - first} tokens at {resolution} a point are more than {MAX_POINTS} points",
                param="resolution",
            )
        reaches = max(0, home.tokens - 1) // chunk * chunk
        computed = 0
        if resolution < chunk:
            computed = max(0, min(last, reaches) - first)
            points = await self._per_token(live, home, first, min(last, reaches), resolution, chunk)
        else:
            level = min((resolution // chunk).bit_length() - 1, LEVELS - 1)
            resolution = chunk << level
            points = await self._per_chunk(live, home, first, last, level, chunk)
        if text and points:
            points = await self._with_text(live, home, points)
        await self._core.make_room()
        return SurpriseTrace(
            version=session.newest.number if version is None else version,
            first=first,
            last=last,
            reaches=reaches,
            resolution=resolution,
            coarsest=max((point.last - point.first for point in points), default=resolution),
            computed=computed,
            points=points,
        )

    async def _per_chunk(
        self, live: Live, home: Point, first: int, last: int, level: int, chunk: int
    ) -> tuple[TracePoint, ...]:
        async with self._core.states.use(live, home) as pinned:
            pyramid = await self._core.engine.trace(pinned.handle)
        found = list(pyramid.cover(first // chunk, -(-last // chunk), level))
        if not found:
            return ()
        spans = [(point.first * chunk, point.last * chunk) for point in found]
        return _points(spans, np.stack([point.values for point in found]))

    async def _per_token(
        self, live: Live, home: Point, first: int, last: int, resolution: int, chunk: int
    ) -> tuple[TracePoint, ...]:
        if last <= first:
            return ()
        start, stop = first // chunk * chunk, -(-last // chunk) * chunk
        if stop - start > MAX_TRACED_TOKENS:
            raise RequestError(
                f"below {chunk} tokens a point, at most {MAX_TRACED_TOKENS} tokens are computed at once, in"
                f" whole chunks; from {first} to {last} it would be {stop - start}",
                param="to",
            )
        _check_retained(live, PER_TOKEN, "resolution")
        base, parts = await self._way(live, home, start, stop, PER_TOKEN)
        async with self._core.states.use(live, base) as pinned:
            tokens = await asyncio.to_thread(tokens_of, self._core.store, parts)
            tenant = live.session.created.tenant
            each = await self._core.engine.trace_tokens(pinned.handle, tokens, tenant)
        begins = np.arange(first, last, resolution)
        ends = np.append(begins[1:], last)
        sums = np.add.reduceat(each[first - start : last - start], begins - first, axis=0, dtype=np.float64)
        # How far the memory moved, and its gain, are a chunk's.
        values = np.full((*sums.shape[:2], len(FIELDS)), np.nan)
        values[..., : sums.shape[2]] = sums / (ends - begins)[:, None, None]
        return _points(list(zip(begins.tolist(), ends.tolist(), strict=True)), values)

    async def _with_text(
        self, live: Live, home: Point, points: tuple[TracePoint, ...]
    ) -> tuple[TracePoint, ...]:
        first, last = points[0].first, points[-1].last
        _check_length(last - first)  # points at the edges reach beyond what was asked for
        _, parts = await self._way(live, home, first, last, TEXT)
        tokens = await asyncio.to_thread(tokens_of, self._core.store, parts)
        decode = self._core.tokenizer.decode
        return tuple(
            dataclasses.replace(point, text=decode(tokens[point.first - first : point.last - first]))
            for point in points
        )

    async def _way(
        self, live: Live, home: Point, start: int, stop: int, what: str
    ) -> tuple[Point, list[Segment]]:
        """The state before token ``start``, and where the tokens [start, stop) are; ``what`` is done with
        them."""
        family = await self._core.registry.family(live.session)
        try:
            upto = Point(home.session_id, home.index, stop)
            return cut(home, start, family), segments(upto, start, family)
        except (VersionNotFound, SnapshotCorrupt) as error:
            raise RequestError(
                f"{what} from the input, and the log doesn't hold all of it here", param="from"
            ) from error


def _check_retained(live: Live, what: str, param: str) -> None:
    if not live.session.created.retain_input:
        raise RequestError(f"{what} from the input, and this session doesn't retain it", param=param)


def _check_length(tokens: int) -> None:
    if tokens > MAX_TEXT_TOKENS:
        raise RequestError(
            f"text is given with at most {MAX_TEXT_TOKENS} tokens, and these points have {tokens}",
            param="text",
        )


def _points(spans: list[tuple[int, int]], values: NDArray[Any]) -> tuple[TracePoint, ...]:
    """``values`` `[points, layers, fields]`."""
    rows = zip(spans, _plain(overall(values)), _plain(values), strict=True)
    return tuple(TracePoint(first=a, last=b, overall=row, layers=layers) for (a, b), row, layers in rows)


def _plain(values: NDArray[Any]) -> Any:
    """As nested lists; None where nothing is known."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()
