"""Owns the CPU kernels of the operator, compiled by Numba: rows are read where they lie, only those that are used.

Half-precision numbers come as arrays of integers (bfloat16 as uint16, float16 as int16), because NumPy has no bfloat16
and Numba no float16 on CPUs; `widen` and `narrow` convert one number, float32 passes. All sums are in float32. The
compiler may reorder a sum (`reassoc`) and fuse a product into it (`contract`), and nothing else: infinities and NaNs
stay what they are, and the mode of the processor (rounding, subnormal numbers) is not touched.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from perft.operator.tables import BASE_SLOT, PAGE_ROWS, RENORMALIZE, VARIANTS, Meta

MATH = {"reassoc", "contract"}
COMPILED = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": MATH}
VARIANT, ACTIVATION, EXPERTS, TOP_K, BOTTLENECK, FLAGS, INDEX = (int(column) for column in Meta)
R, E, D, S = range(len(VARIANTS))
SILU, RELU, GELU = 1, 2, 3
BLOCK = 4
"""Tokens whose products with one row are summed together."""


@intrinsic  # type: ignore[untyped-decorator]
def widen(_typing: Any, value: types.Type) -> Any:
    """One number of an array as float32."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (given,) = arguments
        if value == types.float32:
            return given
        if value == types.int16:
            return builder.fpext(builder.bitcast(given, ir.HalfType()), ir.FloatType())
        wide = builder.shl(builder.zext(given, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(value), code


@intrinsic  # type: ignore[untyped-decorator]
def narrow(_typing: Any, value: types.Type, like: types.Type) -> Any:
    """A float32 as a number of the array that `like` is from, rounded to the nearest, ties to even."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        given = arguments[0]
        if like == types.float32:
            return given
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(given, ir.HalfType()), ir.IntType(16))
        i32 = ir.IntType(32)
        bits = builder.bitcast(given, i32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(i32, 0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", given, given)
        kept = builder.select(is_nan, builder.or_(bits, ir.Constant(i32, 0x400000)), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(i32, 16)), ir.IntType(16))

    return like(types.float32, like), code


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _row(page_index: Any, index: int, row: int) -> Any:
    """Where a slot's logical row lies in the pool."""
    return page_index[index + row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _dot(a_D: Any, b_D: Any) -> Any:
    total = np.float32(0)
    for d in range(a_D.shape[0]):
        total += widen(a_D[d]) * widen(b_D[d])
    return total


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _dot_block(x_TD: Any, t0: int, t1: int, t2: int, t3: int, b_D: Any) -> Any:
    """The products of four tokens with one row."""
    x0_D, x1_D, x2_D, x3_D = x_TD[t0], x_TD[t1], x_TD[t2], x_TD[t3]
    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for d in range(b_D.shape[0]):
        b = widen(b_D[d])
        s0 += widen(x0_D[d]) * b
        s1 += widen(x1_D[d]) * b
        s2 += widen(x2_D[d]) * b
        s3 += widen(x3_D[d]) * b
    return s0, s1, s2, s3


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _activate(activation: int, z: Any) -> Any:
    if activation == SILU:
        return z / (np.float32(1) + np.float32(math.exp(-z)))
    if activation == RELU:
        return z if z > 0 or z != z else np.float32(0)
    if activation == GELU:
        return np.float32(0.5) * z * (np.float32(1) + np.float32(math.erf(z * np.float32(math.sqrt(0.5)))))
    return z


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _choose(logits_M: Any, experts: int, count: int, flags: int, slots_K: Any, chosen_K: Any, weight_K: Any) -> None:
    """PERFT-R's experts of one token and their weights (perft.routing.routed_weights). Changes `logits_M`."""
    highest = logits_M[0]
    for m in range(1, experts):
        highest = max(highest, logits_M[m])
    total = np.float32(0)
    for m in range(experts):
        logits_M[m] = np.float32(math.exp(logits_M[m] - highest))
        total += logits_M[m]
    kept = np.float32(0)
    for k in range(count):
        best = -1
        for m in range(experts):
            if logits_M[m] >= 0 and (best < 0 or logits_M[m] > logits_M[best]):
                best = m
        if best < 0:  # the logits are not finite: so will the output be, and the request ends
            best = k
        chosen_K[k] = best
        weight_K[k] = logits_M[best] / total
        kept += weight_K[k]
        logits_M[best] = np.float32(-1)
    for k in range(count):
        if flags & BASE_SLOT:
            weight_K[k] = slots_K[k]
        elif flags & RENORMALIZE:
            weight_K[k] /= kept


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _shrink_tile(
    layer: int, tile: Any, perm_n: Any, page_index: Any, layer_offset: Any, meta: Any, pool_RD: Any, x_TD: Any,
    base_weight_TJ: Any, base_chosen_TJ: Any, slots_TK: Any, chosen_nK: Any, weight_nK: Any, a_nW: Any,
) -> None:  # fmt: skip
    """Route the tokens of one tile (slot, start, length), then weight * act(Down x) for each expert they use."""
    slot, start, length = tile[0], tile[1], tile[2]
    offset = layer_offset[layer, slot]
    if offset < 0:
        return
    variant, activation, experts = meta[slot, VARIANT], meta[slot, ACTIVATION], meta[slot, EXPERTS]
    size, flags, index = meta[slot, BOTTLENECK], meta[slot, FLAGS], meta[slot, INDEX]
    used = base_chosen_TJ.shape[1] if variant == E else meta[slot, TOP_K]
    first_down = offset + (experts if variant == R else 0)
    if variant == R:
        logits_lM = np.empty((length, experts), np.float32)
        for m in range(experts):
            row_D = pool_RD[_row(page_index, index, offset + m)]
            for i in range(length):
                logits_lM[i, m] = _dot(x_TD[perm_n[start + i]], row_D)
        for i in range(length):
            n = start + i
            _choose(logits_lM[i], experts, used, flags, slots_TK[perm_n[n]], chosen_nK[n], weight_nK[n])
    else:
        for i in range(length):
            n = start + i
            for k in range(used):
                chosen_nK[n, k] = base_chosen_TJ[perm_n[n], k] if variant == E else k
                weight_nK[n, k] = base_weight_TJ[perm_n[n], k] if variant == E else np.float32(1)
    # The tile's uses (token, k), expert after expert: a row is read once for all tokens that use its expert.
    first_M = np.zeros(experts + 2, np.int32)
    for n in range(start, start + length):
        for k in range(used):
            m = chosen_nK[n, k]
            if m < 0 or weight_nK[n, k] == 0:
                chosen_nK[n, k] = -1
            else:
                first_M[m + 2] += 1
    for m in range(experts):
        first_M[m + 2] += first_M[m + 1]
    use_u = np.empty((first_M[experts + 1], 2), np.int32)
    for n in range(start, start + length):
        for k in range(used):
            m = chosen_nK[n, k]
            if m >= 0:
                use_u[first_M[m + 1], 0] = n
                use_u[first_M[m + 1], 1] = k
                first_M[m + 1] += 1
    for m in range(experts):
        begin, end = first_M[m], first_M[m + 1]
        if begin == end:
            continue
        for b in range(size):
            row_D = pool_RD[_row(page_index, index, first_down + m * size + b)]
            u = begin
            while u + BLOCK <= end:
                n0, n1, n2, n3 = use_u[u, 0], use_u[u + 1, 0], use_u[u + 2, 0], use_u[u + 3, 0]
                s0, s1, s2, s3 = _dot_block(x_TD, perm_n[n0], perm_n[n1], perm_n[n2], perm_n[n3], row_D)
                a_nW[n0, use_u[u, 1] * size + b] = s0
                a_nW[n1, use_u[u + 1, 1] * size + b] = s1
                a_nW[n2, use_u[u + 2, 1] * size + b] = s2
                a_nW[n3, use_u[u + 3, 1] * size + b] = s3
                u += BLOCK
            while u < end:
                a_nW[use_u[u, 0], use_u[u, 1] * size + b] = _dot(x_TD[perm_n[use_u[u, 0]]], row_D)
                u += 1
    for n in range(start, start + length):
        for k in range(used):
            if chosen_nK[n, k] >= 0:
                for b in range(size):
                    w = k * size + b
                    a_nW[n, w] = weight_nK[n, k] * _activate(activation, a_nW[n, w])


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _add_rows(total_D: Any, a0: float, a1: float, a2: float, a3: float, r0: Any, r1: Any, r2: Any, r3: Any) -> None:
    for d in range(total_D.shape[0]):
        total_D[d] += a0 * widen(r0[d]) + a1 * widen(r1[d]) + (a2 * widen(r2[d]) + a3 * widen(r3[d]))


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _expand_tile(
    layer: int, tile: Any, perm_n: Any, page_index: Any, layer_offset: Any, meta: Any, pool_RD: Any,
    base_top_k: int, chosen_nK: Any, a_nW: Any, output_TD: Any,
) -> None:  # fmt: skip
    """Add Up a of every expert that the tile's tokens use to their rows of the output."""
    slot, start, length = tile[0], tile[1], tile[2]
    offset = layer_offset[layer, slot]
    if offset < 0:
        return
    variant, experts, size, index = meta[slot, VARIANT], meta[slot, EXPERTS], meta[slot, BOTTLENECK], meta[slot, INDEX]
    used = base_top_k if variant == E else meta[slot, TOP_K]
    first_up = offset + (experts if variant == R else 0) + experts * size
    total_D = np.empty(output_TD.shape[1], np.float32)
    for n in range(start, start + length):
        total_D[:] = 0
        for k in range(used):
            m = chosen_nK[n, k]
            if m < 0:
                continue
            row, w = first_up + m * size, k * size
            b = 0
            while b + BLOCK <= size:
                _add_rows(
                    total_D, a_nW[n, w + b], a_nW[n, w + b + 1], a_nW[n, w + b + 2], a_nW[n, w + b + 3],
                    pool_RD[_row(page_index, index, row + b)], pool_RD[_row(page_index, index, row + b + 1)],
                    pool_RD[_row(page_index, index, row + b + 2)], pool_RD[_row(page_index, index, row + b + 3)],
                )  # fmt: skip
                b += BLOCK
            while b < size:
                up_D, a = pool_RD[_row(page_index, index, row + b)], a_nW[n, w + b]
                for d in range(total_D.shape[0]):
                    total_D[d] += a * widen(up_D[d])
                b += 1
        output_D = output_TD[perm_n[n]]
        for d in range(total_D.shape[0]):
            output_D[d] = narrow(widen(output_D[d]) + total_D[d], output_D[d])


@njit(**COMPILED, parallel=True)  # type: ignore[untyped-decorator]
def shrink(
    layer: int, tiles_L3: Any, perm_n: Any, page_index: Any, layer_offset: Any, meta: Any, pool_RD: Any, x_TD: Any,
    base_weight_TJ: Any, base_chosen_TJ: Any, slots_TK: Any, chosen_nK: Any, weight_nK: Any, a_nW: Any,
) -> None:  # fmt: skip
    """Fill `a_nW` with weight * act(Down x) of every expert that each token uses; threads share out the tiles.

    tiles_L3: slot, start and length of each tile, in entries of perm_n, the tokens. chosen_nK, weight_nK: filled with
    the experts of each token (-1: none) and their weights. base_*: the base's top-k, for E. slots_TK: the base's
    largest probabilities, for `base_slot`.
    """
    for i in prange(tiles_L3.shape[0]):
        _shrink_tile(
            layer, tiles_L3[i], perm_n, page_index, layer_offset, meta, pool_RD, x_TD, base_weight_TJ, base_chosen_TJ,
            slots_TK, chosen_nK, weight_nK, a_nW,
        )  # fmt: skip


@njit(**COMPILED, parallel=True)  # type: ignore[untyped-decorator]
def expand(
    layer: int, tiles_L3: Any, perm_n: Any, page_index: Any, layer_offset: Any, meta: Any, pool_RD: Any,
    base_top_k: int, chosen_nK: Any, a_nW: Any, output_TD: Any,
) -> None:  # fmt: skip
    """Add Up a to the output of every token; threads share out the tiles."""
    for i in prange(tiles_L3.shape[0]):
        _expand_tile(
            layer, tiles_L3[i], perm_n, page_index, layer_offset, meta, pool_RD, base_top_k, chosen_nK, a_nW, output_TD
        )
