"""Owns the CPU kernels of the operator, compiled by Numba: rows are read where they lie, only those that are used.

Half-precision numbers come as arrays of integers (bfloat16 as uint16, float16 as int16), because NumPy has no bfloat16
and Numba no float16 on CPUs; `widen` and `narrow` convert one number, float32 passes. All sums are in float32. The
compiler may reorder a sum (`reassoc`) and fuse a product into it (`contract`), and nothing else: infinities and NaNs
stay what they are, and the mode of the processor (rounding, subnormal numbers) is not touched.
"""

import math
from collections import namedtuple
from enum import IntEnum
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from perft.operator.tables import BASE_SLOT, PAGE_ROWS, RENORMALIZE, VARIANTS, Meta

MATH = {"reassoc", "contract"}
COMPILED = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": MATH}
VARIANT, ACTIVATION, EXPERTS, TOP_K, BOTTLENECK, FLAGS, INDEX = (int(column) for column in Meta)
R, E, D, S = range(len(VARIANTS))
SILU, RELU, GELU = 1, 2, 3
META_COLUMNS = len(Meta) + 1
BLOCK = 4
"""Rows that are read together."""


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
def _dot_rows(x_D: Any, r0_D: Any, r1_D: Any, r2_D: Any, r3_D: Any) -> Any:
    """The products of one token with four rows."""
    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for d in range(x_D.shape[0]):
        x = widen(x_D[d])
        s0 += x * widen(r0_D[d])
        s1 += x * widen(r1_D[d])
        s2 += x * widen(r2_D[d])
        s3 += x * widen(r3_D[d])
    return s0, s1, s2, s3


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _dot_tokens_rows(x_D: Any, y_D: Any, r0_D: Any, r1_D: Any, r2_D: Any, r3_D: Any) -> Any:
    """The products of two tokens with four rows."""
    s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    t0, t1, t2, t3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for d in range(x_D.shape[0]):
        x, y = widen(x_D[d]), widen(y_D[d])
        r0, r1, r2, r3 = widen(r0_D[d]), widen(r1_D[d]), widen(r2_D[d]), widen(r3_D[d])
        s0 += x * r0
        s1 += x * r1
        s2 += x * r2
        s3 += x * r3
        t0 += y * r0
        t1 += y * r1
        t2 += y * r2
        t3 += y * r3
    return s0, s1, s2, s3, t0, t1, t2, t3


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
def _route_tile(
    variant: int, slot: int, offset: int, used: int, start: int, length: int, perm_n: Any, page_index: Any, meta: Any,
    pool_RD: Any, x_TD: Any, base_weight_TJ: Any, base_chosen_TJ: Any, slots_TK: Any, chosen_nK: Any, weight_nK: Any,
) -> None:  # fmt: skip
    """Choose the experts of the tile's tokens; -1 where one has no weight."""
    experts, flags, index = meta[slot, EXPERTS], meta[slot, FLAGS], meta[slot, INDEX]
    if variant == R:
        logits_lM = np.empty((length, experts), np.float32)
        for m in range(experts):
            row_D = pool_RD[_row(page_index, index, offset + m)]
            for i in range(length):
                logits_lM[i, m] = _dot(x_TD[perm_n[start + i]], row_D)
        for i in range(length):
            n = start + i
            _choose(logits_lM[i], experts, used, flags, slots_TK[perm_n[n]], chosen_nK[n], weight_nK[n])
    for n in range(start, start + length):
        for k in range(used):
            if variant == E:
                chosen_nK[n, k], weight_nK[n, k] = base_chosen_TJ[perm_n[n], k], base_weight_TJ[perm_n[n], k]
            elif variant != R:
                chosen_nK[n, k], weight_nK[n, k] = k, 1
            if weight_nK[n, k] == 0:
                chosen_nK[n, k] = -1


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _by_expert(start: int, length: int, used: int, experts: int, chosen_nK: Any) -> Any:
    """The uses (token, k) of a tile's experts, expert after expert, and where each expert's begin."""
    first_M = np.zeros(experts + 2, np.int32)
    for n in range(start, start + length):
        for k in range(used):
            if chosen_nK[n, k] >= 0:
                first_M[chosen_nK[n, k] + 2] += 1
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
    return first_M, use_u


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _down(
    first: int, size: int, index: int, use_u: Any, perm_n: Any, page_index: Any, pool_RD: Any, x_TD: Any, a_nW: Any
) -> None:
    """Down x of one expert, whose rows begin at `first`, for all its uses."""
    uses, b = len(use_u), 0
    while b + BLOCK <= size:
        r0_D = pool_RD[_row(page_index, index, first + b)]
        r1_D = pool_RD[_row(page_index, index, first + b + 1)]
        r2_D = pool_RD[_row(page_index, index, first + b + 2)]
        r3_D = pool_RD[_row(page_index, index, first + b + 3)]
        u = 0
        while u + 2 <= uses:
            a_W = a_nW[use_u[u, 0], use_u[u, 1] * size + b :]
            c_W = a_nW[use_u[u + 1, 0], use_u[u + 1, 1] * size + b :]
            x_D, y_D = x_TD[perm_n[use_u[u, 0]]], x_TD[perm_n[use_u[u + 1, 0]]]
            a_W[0], a_W[1], a_W[2], a_W[3], c_W[0], c_W[1], c_W[2], c_W[3] = _dot_tokens_rows(
                x_D, y_D, r0_D, r1_D, r2_D, r3_D
            )
            u += 2
        if u < uses:
            a_W, x_D = a_nW[use_u[u, 0], use_u[u, 1] * size + b :], x_TD[perm_n[use_u[u, 0]]]
            a_W[0], a_W[1], a_W[2], a_W[3] = _dot_rows(x_D, r0_D, r1_D, r2_D, r3_D)
        b += BLOCK
    while b < size:
        row_D = pool_RD[_row(page_index, index, first + b)]
        for u in range(uses):
            a_nW[use_u[u, 0], use_u[u, 1] * size + b] = _dot(x_TD[perm_n[use_u[u, 0]]], row_D)
        b += 1


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _add_rows(total_D: Any, a_4: Any, r0_D: Any, r1_D: Any, r2_D: Any, r3_D: Any) -> None:
    a0, a1, a2, a3 = a_4[0], a_4[1], a_4[2], a_4[3]
    for d in range(total_D.shape[0]):
        total_D[d] += (a0 * widen(r0_D[d]) + a1 * widen(r1_D[d])) + (a2 * widen(r2_D[d]) + a3 * widen(r3_D[d]))


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _up(first: int, size: int, index: int, a_B: Any, page_index: Any, pool_RD: Any, total_D: Any) -> None:
    """Add Up a of one expert, whose rows begin at `first`, for one token."""
    b = 0
    while b + BLOCK <= size:
        _add_rows(
            total_D, a_B[b:],
            pool_RD[_row(page_index, index, first + b)], pool_RD[_row(page_index, index, first + b + 1)],
            pool_RD[_row(page_index, index, first + b + 2)], pool_RD[_row(page_index, index, first + b + 3)],
        )  # fmt: skip
        b += BLOCK
    while b < size:
        row_D, a = pool_RD[_row(page_index, index, first + b)], a_B[b]
        for d in range(total_D.shape[0]):
            total_D[d] += a * widen(row_D[d])
        b += 1


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _tile(
    layer: int, tile: Any, perm_n: Any, page_index: Any, layer_offset: Any, meta: Any, pool_RD: Any, x_TD: Any,
    base_weight_TJ: Any, base_chosen_TJ: Any, slots_TK: Any, chosen_nK: Any, weight_nK: Any, a_nW: Any, output_TD: Any,
) -> None:  # fmt: skip
    """The delta of one tile (slot, start, length): route, Down, activation and weight, Up."""
    slot, start, length = tile[0], tile[1], tile[2]
    offset = layer_offset[layer, slot]
    if offset < 0:
        return
    variant, activation, experts = meta[slot, VARIANT], meta[slot, ACTIVATION], meta[slot, EXPERTS]
    size, index = meta[slot, BOTTLENECK], meta[slot, INDEX]
    used = base_chosen_TJ.shape[1] if variant == E else meta[slot, TOP_K]
    first_down = offset + (experts if variant == R else 0)
    first_up = first_down + experts * size
    _route_tile(
        variant, slot, offset, used, start, length, perm_n, page_index, meta, pool_RD, x_TD, base_weight_TJ,
        base_chosen_TJ, slots_TK, chosen_nK, weight_nK,
    )  # fmt: skip
    first_M, use_u = _by_expert(start, length, used, experts, chosen_nK)
    for m in range(experts):
        if first_M[m] < first_M[m + 1]:
            of_expert_u = use_u[first_M[m] : first_M[m + 1]]
            _down(first_down + m * size, size, index, of_expert_u, perm_n, page_index, pool_RD, x_TD, a_nW)
    total_D = np.empty(output_TD.shape[1], np.float32)
    for n in range(start, start + length):
        total_D[:] = 0
        for k in range(used):
            m = chosen_nK[n, k]
            if m < 0:
                continue
            a_B = a_nW[n, k * size : (k + 1) * size]
            for b in range(size):
                a_B[b] = weight_nK[n, k] * _activate(activation, a_B[b])
            _up(first_up + m * size, size, index, a_B, page_index, pool_RD, total_D)
        output_D = output_TD[perm_n[n]]
        for d in range(total_D.shape[0]):
            output_D[d] = narrow(widen(output_D[d]) + total_D[d], output_D[d])


class Plan(IntEnum):
    """Entries of the int64 array that describes a step to `add_delta`: addresses (C-contiguous arrays), sizes."""

    TILES = 0  # int32 [TILE_COUNT, 3]: slot, start and length of each tile, in entries of TOKENS
    TILE_COUNT = 1
    TOKENS = 2  # int64 [TOKEN_COUNT]: positions in the step, group after group
    TOKEN_COUNT = 3
    PAGE_INDEX = 4  # the tables (perft.operator.tables)
    LAYER_OFFSET = 5
    META = 6
    ENTRIES = 7
    LAYERS = 8
    SLOTS = 9
    POOL = 10  # [ROWS, WIDTH]
    ROWS = 11
    WIDTH = 12
    STEP_TOKENS = 13  # rows of the step's input and output
    CHOSEN = 14  # int32 [TOKEN_COUNT, TOP_K], filled: the experts of each token (-1: none)
    WEIGHT = 15  # float32 [TOKEN_COUNT, TOP_K], filled: their weights
    TOP_K = 16
    ACTIVATIONS = 17  # float32 [TOKEN_COUNT, ACTIVATION_WIDTH], filled
    ACTIVATION_WIDTH = 18
    BASE_TOP_K = 19
    BASE_SLOTS = 20


PLAN_ENTRIES = len(Plan)
# Numba takes no enumeration as an index.
AT: Any = namedtuple("AT", list(Plan.__members__))(*map(int, Plan))  # type: ignore[arg-type]


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_typing: Any, address: types.Integer) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), code


def _add_delta(dtype: Any, together: bool) -> Any:
    """`add_delta` for a pool of one dtype, for all threads or for the calling one alone.

    It takes plain numbers: between two products of the base nothing of Python is in the processor's caches, and to look
    at a dozen arrays takes longer than the work on a few tokens.
    """

    @njit(**COMPILED, parallel=together)  # type: ignore[untyped-decorator]
    def add_delta(
        plan: int, layer: int, x: int, base_weight: int, base_chosen: int, base_slots: int, output: int
    ) -> None:
        """Add the delta of one layer to its output, tile after tile.

        All but `layer` are addresses: of the plan's array, the layer's input and output [T, D], and, where a token
        needs them, the base's top-k (float32 and int32 [T, J]) and largest probabilities (float32 [T, K]).
        """
        p = carray(_pointer(plan), (PLAN_ENTRIES,), np.int64)
        tiles_L3 = carray(_pointer(p[AT.TILES]), (p[AT.TILE_COUNT], 3), np.int32)
        perm_n = carray(_pointer(p[AT.TOKENS]), (p[AT.TOKEN_COUNT],), np.int64)
        page_index = carray(_pointer(p[AT.PAGE_INDEX]), (p[AT.ENTRIES],), np.int32)
        layer_offset = carray(_pointer(p[AT.LAYER_OFFSET]), (p[AT.LAYERS], p[AT.SLOTS]), np.int32)
        meta = carray(_pointer(p[AT.META]), (p[AT.SLOTS], META_COLUMNS), np.int32)
        pool_RD = carray(_pointer(p[AT.POOL]), (p[AT.ROWS], p[AT.WIDTH]), dtype)
        x_TD = carray(_pointer(x), (p[AT.STEP_TOKENS], p[AT.WIDTH]), dtype)
        output_TD = carray(_pointer(output), (p[AT.STEP_TOKENS], p[AT.WIDTH]), dtype)
        base_weight_TJ = carray(_pointer(base_weight), (p[AT.STEP_TOKENS], p[AT.BASE_TOP_K]), np.float32)
        base_chosen_TJ = carray(_pointer(base_chosen), (p[AT.STEP_TOKENS], p[AT.BASE_TOP_K]), np.int32)
        slots_TK = carray(_pointer(base_slots), (p[AT.STEP_TOKENS], p[AT.BASE_SLOTS]), np.float32)
        chosen_nK = carray(_pointer(p[AT.CHOSEN]), (p[AT.TOKEN_COUNT], p[AT.TOP_K]), np.int32)
        weight_nK = carray(_pointer(p[AT.WEIGHT]), (p[AT.TOKEN_COUNT], p[AT.TOP_K]), np.float32)
        a_nW = carray(_pointer(p[AT.ACTIVATIONS]), (p[AT.TOKEN_COUNT], p[AT.ACTIVATION_WIDTH]), np.float32)
        if together:  # named here: Numba tells kept kernels apart by what they name, not by how they are compiled
            for i in prange(p[AT.TILE_COUNT]):
                _tile(
                    layer, tiles_L3[i], perm_n, page_index, layer_offset, meta, pool_RD, x_TD, base_weight_TJ,
                    base_chosen_TJ, slots_TK, chosen_nK, weight_nK, a_nW, output_TD,
                )  # fmt: skip
        else:
            for i in range(p[AT.TILE_COUNT]):
                _tile(
                    layer, tiles_L3[i], perm_n, page_index, layer_offset, meta, pool_RD, x_TD, base_weight_TJ,
                    base_chosen_TJ, slots_TK, chosen_nK, weight_nK, a_nW, output_TD,
                )  # fmt: skip

    return add_delta


ADD_DELTA = {
    (dtype, together): _add_delta(np.dtype(dtype), together)
    for dtype in ("float32", "uint16", "int16")
    for together in (False, True)
}
"""By the numbers that the pool holds (see above), and whether threads share out the tiles."""
