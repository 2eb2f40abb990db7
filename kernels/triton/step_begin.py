"""What a step begins with, in one launch: its table from the host's memory, the tokens' rows of the
embedding, and the angles of their places. Knows no layer."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.kernels.triton.step_table import INDEX, POSITION, TOKEN, step_field


@triton.jit(do_not_specialize=["count"])
def step_begin_kernel(
    sent,
    table,
    count,
    embedding,
    residual,
    cos,
    sin,
    cos_of,
    sin_of,
    FIELDS: tl.constexpr,
    ROOM: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    HALF: tl.constexpr,
):
    """Programs are sessions. PLACES that there are angles of, over and over; 0: none."""
    row = tl.program_id(0)
    field = tl.arange(0, ROOM)
    known = field < FIELDS
    fields = tl.load(sent + field * count + row, mask=known)
    token = step_field(sent, TOKEN, row, count)
    if PLACES:
        place = (step_field(sent, POSITION, row, count) + step_field(sent, INDEX, row, count)) % PLACES
        half = tl.arange(0, HALF)
        tl.store(cos + row * HALF + half, tl.load(cos_of + place * HALF + half))
        tl.store(sin + row * HALF + half, tl.load(sin_of + place * HALF + half))
    tl.store(table + field * count + row, fields, mask=known)
    column = tl.arange(0, WIDTH)
    inside = column < N
    x = tl.load(embedding + token * N + column, mask=inside)
    tl.store(residual + row * N + column, x, mask=inside)


def step_begin(
    sent: Tensor,
    table: Tensor,
    embedding: Tensor,
    residual: Tensor,
    angles: tuple[Tensor, Tensor],
    angles_of: tuple[Tensor, Tensor] | None,
) -> None:
    """``sent``, in the host's memory that a device reads itself, into ``table``; rows of ``embedding``
    `[vocab, dim]` into ``residual`` `[sessions, dim]`. ``angles_of`` `[places, D / 2]`, a row for each token
    of a segment, into ``angles`` `[sessions, D / 2]`; None: left alone."""
    fields, sessions = table.shape
    N = embedding.shape[1]
    places, half = (0, 1) if angles_of is None else angles_of[0].shape
    step_begin_kernel[(sessions,)](
        sent,
        table,
        sessions,
        embedding,
        residual,
        *angles,
        *(angles_of or angles),
        FIELDS=fields,
        ROOM=triton.next_power_of_2(fields),
        N=N,
        WIDTH=triton.next_power_of_2(N),
        PLACES=places,
        HALF=half,
        num_warps=4,
    )
