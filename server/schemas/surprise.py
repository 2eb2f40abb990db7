"""The answer of the surprise route."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from mnemosyne.engine.pyramid import FIELDS
from mnemosyne.server.sessions.views import SurpriseTrace, TracePoint


class Layers(BaseModel):
    """What a point says, layer by layer."""

    surprise: list[float | None]
    momentary: list[float | None]
    moved: list[float | None]
    gain: list[float | None]


class SurprisePoint(BaseModel):
    """Tokens [from, to); means over layers, heads and tokens, the largest gain. null: not known."""

    start: int = Field(serialization_alias="from")
    to: int
    surprise: float | None = Field(description="Norm of a token's inner gradient, before clipping.")
    momentary: float | None = Field(description="The same, each memory layer's part times its theta.")
    moved: float | None = Field(
        description="How far a chunk moved the memory, in lengths of the memory; null below a chunk."
    )
    gain: float | None = Field(
        description="By how much a chunk may amplify a disturbance of the memory; null below a chunk."
    )
    layers: Layers | None = Field(None, description="Where asked for.")
    text: str | None = Field(None, description="What was read there, where asked for.")


class SurpriseAnswer(BaseModel):
    """What reading did to a session's memory."""

    session_id: str
    version: int
    unit: Literal["tokens"] = "tokens"
    start: int = Field(serialization_alias="from")
    to: int
    reaches: int = Field(
        description="Where the last committed chunk ends; tokens after it have no values yet."
    )
    resolution: int = Field(
        description="Tokens a point, where there are as many and they are kept so finely."
    )
    coarsest: int = Field(description="Tokens of the longest point: old text may be kept more coarsely.")
    points: list[SurprisePoint]

    @classmethod
    def of(cls, session_id: str, trace: SurpriseTrace, layers: bool) -> SurpriseAnswer:
        return cls(
            session_id=session_id,
            version=trace.version,
            unit="tokens",
            start=trace.first,
            to=trace.last,
            reaches=trace.reaches,
            resolution=trace.resolution,
            coarsest=trace.coarsest,
            points=[_point(point, layers) for point in trace.points],
        )


def _point(point: TracePoint, layers: bool) -> SurprisePoint:
    values: dict[str, Any] = dict(zip(FIELDS, point.overall, strict=True))
    if layers:
        rows = map(list, zip(*point.layers, strict=True))
        values["layers"] = Layers(**dict(zip(FIELDS, rows, strict=True)))
    if point.text is not None:
        values["text"] = point.text
    return SurprisePoint(start=point.first, to=point.last, **values)
