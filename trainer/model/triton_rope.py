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
def _turn(x, turn, BACK: tl.constexpr):
    """Multiplies the pairs [..., pairs, 2] by the unit complex numbers [1, pairs, 2], or by their conjugates."""
    a, b = tl.split(x)
    cos, sin = tl.split(turn)
    if BACK:
        sin = -sin
    return tl.join(a * cos - b * sin, a * sin + b * cos)


@triton.jit
def _forward(
    q, kv, k_pe, turns, k, v, heads, NOPE: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr,
    PART: tl.constexpr, COPY_V: tl.constexpr, V_WIDTH: tl.constexpr, ROPE2: tl.constexpr, NOPE2: tl.constexpr,
    V2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_head = head < heads
    WIDTH: tl.constexpr = NOPE + 2 * PAIRS
    pair, part = tl.arange(0, ROPE2), tl.arange(0, 2)
    at_rope = pair[:, None] * STEP + part[None, :] * PART  # [pairs, 2]
    is_pair = pair < PAIRS
    turn = tl.load(turns + token * (2 * PAIRS) + pair[:, None] * 2 + part[None, :], mask=is_pair[:, None], other=0.0)
    turn = turn[None, :, :]
    mask = is_head[:, None, None] & is_pair[None, :, None] & (part < 2)[None, None, :]

    at = (token * heads + head)[:, None, None] * WIDTH + NOPE + at_rope[None, :, :]
    turned = _turn(tl.load(q + at, mask=mask, other=0.0).to(tl.float32), turn, False)
    tl.store(q + at, turned.to(q.dtype.element_ty), mask=mask)

    shared = tl.load(k_pe + token * (2 * PAIRS) + at_rope, mask=is_pair[:, None], other=0.0).to(tl.float32)
    shared = _turn(shared[None, :, :], turn, False)
    tl.store(k + at, tl.broadcast_to(shared, [TILE, ROPE2, 2]).to(k.dtype.element_ty), mask=mask)

    column = tl.arange(0, NOPE2)
    inside = is_head[:, None] & (column < NOPE)[None, :]
    source = (token * heads + head)[:, None] * (NOPE + V)
    own = tl.load(kv + source + column[None, :], mask=inside, other=0.0)
    tl.store(k + (token * heads + head)[:, None] * WIDTH + column[None, :], own, mask=inside)
    if COPY_V:  # into rows of V_WIDTH, the end filled with zeros
        column = tl.arange(0, V2)
        value = tl.load(kv + source + NOPE + column[None, :], mask=is_head[:, None] & (column < V)[None, :], other=0.0)
        target = (token * heads + head)[:, None] * V_WIDTH + column[None, :]
        tl.store(v + target, value, mask=is_head[:, None] & (column < V_WIDTH)[None, :])


@triton.jit
def _backward(
    dq, dk, dv, turns, dkv, dk_pe, heads, dv_token, dv_head, NOPE: tl.constexpr, V: tl.constexpr, PAIRS: tl.constexpr,
    STEP: tl.constexpr, PART: tl.constexpr, ROPE2: tl.constexpr, NOPE2: tl.constexpr, V2: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = NOPE + 2 * PAIRS
    pair, part = tl.arange(0, ROPE2), tl.arange(0, 2)
    at_rope = pair[:, None] * STEP + part[None, :] * PART
    is_pair = pair < PAIRS
    turn = tl.load(turns + token * (2 * PAIRS) + pair[:, None] * 2 + part[None, :], mask=is_pair[:, None], other=0.0)
    turn = turn[None, :, :]
    shared = tl.zeros([ROPE2, 2], tl.float32)
    for first in range(0, heads, TILE):
        head = first + tl.arange(0, TILE)
        is_head = head < heads
        mask = is_head[:, None, None] & is_pair[None, :, None] & (part < 2)[None, None, :]
        at = (token * heads + head)[:, None, None] * WIDTH + NOPE + at_rope[None, :, :]
        back = _turn(tl.load(dq + at, mask=mask, other=0.0).to(tl.float32), turn, True)
        tl.store(dq + at, back.to(dq.dtype.element_ty), mask=mask)
        shared += tl.sum(tl.load(dk + at, mask=mask, other=0.0).to(tl.float32), 0)

        column = tl.arange(0, NOPE2)
        inside = is_head[:, None] & (column < NOPE)[None, :]
        own = tl.load(dk + (token * heads + head)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        target = (token * heads + head)[:, None] * (NOPE + V)
        tl.store(dkv + target + column[None, :], own, mask=inside)
        column = tl.arange(0, V2)
        inside = is_head[:, None] & (column < V)[None, :]
        value = tl.load(dv + token * dv_token + head[:, None] * dv_head + column[None, :], mask=inside, other=0.0)
        tl.store(dkv + target + NOPE + column[None, :], value, mask=inside)
    one = is_pair[None, :, None] & (part < 2)[None, None, :]
    back = _turn(shared[None, :, :], turn, True)
    tl.store(dk_pe + token * (2 * PAIRS) + at_rope[None, :, :], back.to(dk_pe.dtype.element_ty), mask=one)


def _shape(heads: int, nope: int, v: int, pairs: int, interleave: bool) -> dict[str, int]:
    return {
        "NOPE": nope, "V": v, "PAIRS": pairs, "STEP": 2 if interleave else 1, "PART": 1 if interleave else pairs,
        "ROPE2": triton.next_power_of_2(pairs), "NOPE2": triton.next_power_of_2(nope),
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
        q, kv, k_pe, torch.view_as_real(turn), k, values, heads, COPY_V=v_width is not None, V_WIDTH=v_width or v,
        V2=triton.next_power_of_2(v_width or v), **shape,
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
