"""MLA's queries and keys as the attention wants them, on a GPU: rotation, and the key put together of the part of every
head and the rotated part that all heads share. Forward and backward are one pass each; the queries (and the gradient
of the queries) are turned where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Complex, Float
from torch import Tensor

HEADS = 16  # of a tile


@triton.jit
def _load_pairs(at, is_head, PAIRS: tl.constexpr, PAIRS2: tl.constexpr, INTERLEAVE: tl.constexpr, TILE: tl.constexpr):
    """Both numbers of every pair of the rows that begin at `at`, [TILE, PAIRS2] each, float32."""
    if INTERLEAVE:  # one read of neighbours, taken apart in registers
        column = tl.arange(0, 2 * PAIRS2)
        both = tl.load(at[:, None] + column[None, :], mask=is_head[:, None] & (column < 2 * PAIRS)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(both.to(tl.float32), [TILE, PAIRS2, 2]))
    else:
        column = tl.arange(0, PAIRS2)
        mask = is_head[:, None] & (column < PAIRS)[None, :]
        a = tl.load(at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at[:, None] + column[None, :] + PAIRS, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    at, a, b, is_head, PAIRS: tl.constexpr, PAIRS2: tl.constexpr, INTERLEAVE: tl.constexpr, TILE: tl.constexpr
):
    if INTERLEAVE:
        column = tl.arange(0, 2 * PAIRS2)
        both = tl.reshape(tl.join(a, b), [TILE, 2 * PAIRS2]).to(at.dtype.element_ty)
        tl.store(at[:, None] + column[None, :], both, mask=is_head[:, None] & (column < 2 * PAIRS)[None, :])
    else:
        column = tl.arange(0, PAIRS2)
        mask = is_head[:, None] & (column < PAIRS)[None, :]
        tl.store(at[:, None] + column[None, :], a.to(at.dtype.element_ty), mask=mask)
        tl.store(at[:, None] + column[None, :] + PAIRS, b.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _cosine_sine(turns, token, PAIRS: tl.constexpr, PAIRS2: tl.constexpr):
    column = tl.arange(0, 2 * PAIRS2)
    both = tl.load(turns + token * (2 * PAIRS) + column, mask=column < 2 * PAIRS, other=0.0)
    cos, sin = tl.split(tl.reshape(both, [PAIRS2, 2]))
    return cos[None, :], sin[None, :]


@triton.jit
def _forward(
    q, kv, k_pe, turns, k, v, heads, pe_stride, NOPE: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVE: tl.constexpr, COPY_V: tl.constexpr, V_WIDTH: tl.constexpr, PAIRS2: tl.constexpr, NOPE2: tl.constexpr,
    V2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_head = head < heads
    row = token * heads + head
    WIDTH: tl.constexpr = NOPE + 2 * PAIRS
    column = tl.arange(0, NOPE2)
    inside = is_head[:, None] & (column < NOPE)[None, :]
    own = tl.load(kv + row[:, None] * (NOPE + V) + column[None, :], mask=inside, other=0.0)
    cos, sin = _cosine_sine(turns, token, PAIRS, PAIRS2)
    a, b = _load_pairs(q + row * WIDTH + NOPE, is_head, PAIRS, PAIRS2, INTERLEAVE, TILE)
    one = tl.arange(0, 1)
    c, d = _load_pairs(k_pe + token * pe_stride + one, one == 0, PAIRS, PAIRS2, INTERLEAVE, 1)
    _store_pairs(q + row * WIDTH + NOPE, a * cos - b * sin, a * sin + b * cos, is_head, PAIRS, PAIRS2, INTERLEAVE, TILE)
    tl.store(k + row[:, None] * WIDTH + column[None, :], own, mask=inside)
    c, d = c * cos - d * sin, c * sin + d * cos
    c, d = tl.broadcast_to(c, [TILE, PAIRS2]), tl.broadcast_to(d, [TILE, PAIRS2])
    _store_pairs(k + row * WIDTH + NOPE, c, d, is_head, PAIRS, PAIRS2, INTERLEAVE, TILE)
    if COPY_V:  # into rows of V_WIDTH, the end filled with zeros
        column = tl.arange(0, V2)
        inside = is_head[:, None] & (column < V)[None, :]
        value = tl.load(kv + row[:, None] * (NOPE + V) + NOPE + column[None, :], mask=inside, other=0.0)
        target = v + row[:, None] * V_WIDTH + column[None, :]
        tl.store(target, value, mask=is_head[:, None] & (column < V_WIDTH)[None, :])


@triton.jit
def _backward(
    dq, dk, dv, turns, dkv, dk_pe, heads, dv_token, dv_head, NOPE: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVE: tl.constexpr, PAIRS2: tl.constexpr, NOPE2: tl.constexpr, V2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = NOPE + 2 * PAIRS
    cos, sin = _cosine_sine(turns, token, PAIRS, PAIRS2)
    shared_a, shared_b = tl.zeros([PAIRS2], tl.float32), tl.zeros([PAIRS2], tl.float32)
    for first in range(0, heads, TILE):
        head = first + tl.arange(0, TILE)
        is_head = head < heads
        row = token * heads + head
        column = tl.arange(0, NOPE2)
        inside = is_head[:, None] & (column < NOPE)[None, :]
        own = tl.load(dk + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        v_column = tl.arange(0, V2)
        v_inside = is_head[:, None] & (v_column < V)[None, :]
        value = tl.load(dv + token * dv_token + head[:, None] * dv_head + v_column[None, :], mask=v_inside, other=0.0)
        a, b = _load_pairs(dq + row * WIDTH + NOPE, is_head, PAIRS, PAIRS2, INTERLEAVE, TILE)
        c, d = _load_pairs(dk + row * WIDTH + NOPE, is_head, PAIRS, PAIRS2, INTERLEAVE, TILE)
        shared_a += tl.sum(c, 0)
        shared_b += tl.sum(d, 0)
        tl.store(dkv + row[:, None] * (NOPE + V) + column[None, :], own, mask=inside)
        tl.store(dkv + row[:, None] * (NOPE + V) + NOPE + v_column[None, :], value, mask=v_inside)
        _store_pairs(  # turned back: by the conjugate
            dq + row * WIDTH + NOPE, a * cos + b * sin, b * cos - a * sin, is_head, PAIRS, PAIRS2, INTERLEAVE, TILE
        )
    one = tl.arange(0, 1)
    c, d = shared_a[None, :], shared_b[None, :]
    c, d = c * cos + d * sin, d * cos - c * sin
    _store_pairs(dk_pe + token * (2 * PAIRS) + one, c, d, one == 0, PAIRS, PAIRS2, INTERLEAVE, 1)


@triton.jit
def _resize(x, y, rows, X: tl.constexpr, Y: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < rows)[:, None]
    value = tl.load(x + row[:, None] * X + column[None, :], mask=real & (column < X)[None, :], other=0.0)
    tl.store(y + row[:, None] * Y + column[None, :], value, mask=real & (column < Y)[None, :])


def resize(x: Float[Tensor, "n heads width"], width: int) -> Float[Tensor, "n heads new_width"]:
    """Every row cut to `width` columns, or filled up with zeros, in one pass; `x` itself if it has that many."""
    x = x.contiguous()
    if x.shape[2] == width:
        return x
    y = x.new_empty(*x.shape[:2], width)
    rows, block = x.shape[0] * x.shape[1], triton.next_power_of_2(max(x.shape[2], width))
    tile = max(4096 // block, 1)
    _resize[(triton.cdiv(rows, tile),)](x, y, rows, X=x.shape[2], Y=width, ROWS=tile, BLOCK=block, num_warps=4)
    return y


def _shape(heads: int, nope: int, v: int, pairs: int, interleave: bool) -> dict[str, int]:
    return {
        "NOPE": nope, "V": v, "PAIRS": pairs, "INTERLEAVE": interleave, "PAIRS2": triton.next_power_of_2(pairs),
        "NOPE2": triton.next_power_of_2(nope),
        "TILE": min(triton.next_power_of_2(heads), HEADS), "num_warps": 4,
    }  # fmt: skip


def queries_keys_values_(
    q: Float[Tensor, "n heads nope+rope"],
    kv: Float[Tensor, "n heads nope+v"],
    k_pe: Float[Tensor, "n rope"],
    turn: Complex[Tensor, "n pairs"],
    interleave: bool,
    v_width: int | None = None,
) -> tuple[Float[Tensor, "n heads nope+rope"], Float[Tensor, "n heads nope+rope"], Float[Tensor, "n heads v"]]:
    """Turns the last columns of `q` in place (see `rope.apply_rope`), puts the keys together, and returns q, k and v.
    The values are a view of `kv`, or a copy in rows of `v_width` filled up with zeros."""
    n, heads, width = q.shape
    rope = k_pe.shape[1]
    nope = width - rope
    v = kv.shape[2] - nope
    k = torch.empty_like(q)
    values = kv[..., nope:] if v_width is None else kv.new_empty(n, heads, v_width)
    shape = _shape(heads, nope, v, rope // 2, interleave)
    _forward[(n, triton.cdiv(heads, shape["TILE"]))](
        q, kv, k_pe, torch.view_as_real(turn), k, values, heads, k_pe.stride(0), COPY_V=v_width is not None,
        V_WIDTH=v_width or v, V2=triton.next_power_of_2(v_width or v), **shape,
    )  # fmt: skip
    return q, k, values


def backward_(
    dq: Float[Tensor, "n heads nope+rope"],
    dk: Float[Tensor, "n heads nope+rope"],
    dv: Float[Tensor, "n heads v_width"],
    turn: Complex[Tensor, "n pairs"],
    v: int,
    interleave: bool,
) -> tuple[Float[Tensor, "n heads nope+rope"], Float[Tensor, "n heads nope+v"], Float[Tensor, "n rope"]]:
    """The gradients of `queries_keys_values_`'s three inputs; `dq` is turned back in place, `dv`'s columns past `v`
    are left out."""
    n, heads, width = dq.shape
    pairs = turn.shape[1]
    nope = width - 2 * pairs
    dkv, dk_pe = dq.new_empty(n, heads, nope + v), dq.new_empty(n, 2 * pairs)
    _backward[(n,)](
        dq, dk, dv, torch.view_as_real(turn), dkv, dk_pe, heads, dv.stride(0), dv.stride(1),
        V2=triton.next_power_of_2(v), **_shape(heads, nope, v, pairs, interleave),
    )  # fmt: skip
    return dq, dkv, dk_pe
