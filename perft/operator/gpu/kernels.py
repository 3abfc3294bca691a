# A kernel's arguments are Triton's own types while it is compiled, which no annotation can say.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The three kernels of the Triton back end: route, shrink, expand. One launch of each makes the delta of one layer.

A tile is up to TILE tokens of one slot; position p = tile_start + i, i < tile_len, holds token t = perm_T[p]. A program
whose tile has no slot, or whose slot has no rows in the layer, does nothing.

    route    weights_PX[p, m]    weight of expert m for token p (0: not selected), for adapters that choose (R, E)
             hits_NX[tile, 0..h) the h = hit_counts_N[tile] experts that a token of the tile selected, ascending
    shrink   a_PW[p, c]          weight * act(down x), where c = e B + b stands for column b of expert hits_NX[tile, e]
    expand   output[t]           += sum over c of a_PW[p, c] up[c]

D and S select every expert with weight 1, so for them hits is 0..M - 1 and route does nothing. Only rows of experts in
`hits` are read, each once per tile in shrink and, D-block by D-block, once per tile in expand. Sums over D and over c
are made inside one program in a fixed order: no atomics, the same bits every time. Everything is computed in float32.

OVERLAP: a launch begins while the one before it ends (programmatic dependent launch, from compute capability 9.0 on);
what that one wrote is read after `gdc_wait`, and every program waits, so that launches still end in their order.

A weight of 0 never meets an infinity: shrink selects by `where`. A value that is not finite stays in its token's row.
"""

import triton
import triton.language as tl

from perft.operator import tables
from perft.operator.tables import Meta

PAGE_ROWS = tl.constexpr(tables.PAGE_ROWS)
META_COLUMNS = tl.constexpr(len(Meta) + 1)
VARIANT = tl.constexpr(Meta.VARIANT.value)
ACTIVATION = tl.constexpr(Meta.ACTIVATION.value)
NUM_EXPERTS = tl.constexpr(Meta.EXPERTS.value)
TOP_K = tl.constexpr(Meta.TOP_K.value)
BOTTLENECK = tl.constexpr(Meta.BOTTLENECK.value)
FLAGS = tl.constexpr(Meta.FLAGS.value)
INDEX = tl.constexpr(Meta.INDEX.value)
ROUTED = tl.constexpr(tables.VARIANTS.index("R"))
EMBEDDED = tl.constexpr(tables.VARIANTS.index("E"))
SILU = tl.constexpr(tables.ACTIVATIONS.index("silu"))
RELU = tl.constexpr(tables.ACTIVATIONS.index("relu"))
GELU = tl.constexpr(tables.ACTIVATIONS.index("gelu"))
RENORMALIZE = tl.constexpr(tables.RENORMALIZE)
BASE_SLOT = tl.constexpr(tables.BASE_SLOT)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite float32: stands for an infinite logit, so that -inf can mean "not a candidate"."""


@triton.jit(do_not_specialize=["layer"])
def route(
    pool_RD, page_index_I, layer_offset_LS, meta_S8,
    perm_T, tile_slot_N, tile_start_N, tile_len_N,
    x_TD, base_logits_TN, base_weights_TJ, base_ids_TJ,
    weights_PX, hits_NX, hit_counts_N, counts_SM,
    layer, slots, hidden_size, base_experts, count_columns,
    EXPERTS: tl.constexpr,
    FEW_EXPERTS: tl.constexpr, FEW_TOKENS: tl.constexpr, FEW_D: tl.constexpr,
    SOME_EXPERTS: tl.constexpr, SOME_TOKENS: tl.constexpr, SOME_D: tl.constexpr,
    OWN_EXPERTS: tl.constexpr, OWN_TOKENS: tl.constexpr, OWN_D: tl.constexpr,
    BASE_EXPERTS: tl.constexpr, BASE_TOKENS: tl.constexpr, BASE_TOP_K: tl.constexpr, HAS_LOGITS: tl.constexpr,
    COUNT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weights and hits of one tile, some tokens at a time. Grid (N,).

    EXPERTS: columns of `weights_PX` and `hits_NX`. OWN_EXPERTS and BASE_EXPERTS: powers of two, not below the largest M
    of R and not below N. Adapters of up to FEW_EXPERTS, and of up to SOME_EXPERTS, have blocks of their own, since the
    widest ones read few columns at a time. HAS_LOGITS, BASE_TOP_K: whether the base's logits are given; J, or 0 where
    its top-k is not. COUNT: add each expert's tokens to `counts_SM`.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    slot, offset, meta_8, start, length = _found(
        tile, layer, slots, layer_offset_LS, meta_S8, tile_slot_N, tile_start_N, tile_len_N
    )
    variant = tl.load(meta_8 + VARIANT)
    if (offset < 0) | (variant > EMBEDDED):
        return
    hits_X, hit_count, counts_M = hits_NX + tile * EXPERTS, hit_counts_N + tile, counts_SM + slot * count_columns
    if variant == ROUTED:
        experts = tl.load(meta_8 + NUM_EXPERTS)
        if experts <= FEW_EXPERTS:
            _route_own(
                pool_RD, page_index_I, meta_8, offset, perm_T, start, length, x_TD, base_logits_TN, weights_PX, hits_X,
                hit_count, counts_M, experts, hidden_size, base_experts,
                EXPERTS, FEW_EXPERTS, FEW_TOKENS, FEW_D, BASE_EXPERTS, HAS_LOGITS, COUNT,
            )  # fmt: skip
        elif experts <= SOME_EXPERTS:
            _route_own(
                pool_RD, page_index_I, meta_8, offset, perm_T, start, length, x_TD, base_logits_TN, weights_PX, hits_X,
                hit_count, counts_M, experts, hidden_size, base_experts,
                EXPERTS, SOME_EXPERTS, SOME_TOKENS, SOME_D, BASE_EXPERTS, HAS_LOGITS, COUNT,
            )  # fmt: skip
        else:
            _route_own(
                pool_RD, page_index_I, meta_8, offset, perm_T, start, length, x_TD, base_logits_TN, weights_PX, hits_X,
                hit_count, counts_M, experts, hidden_size, base_experts,
                EXPERTS, OWN_EXPERTS, OWN_TOKENS, OWN_D, BASE_EXPERTS, HAS_LOGITS, COUNT,
            )  # fmt: skip
    elif BASE_TOP_K > 0:
        used_N = tl.zeros([BASE_EXPERTS], tl.int32)
        for first in range(0, length, BASE_TOKENS):
            position_n = start + first + tl.arange(0, BASE_TOKENS)
            is_token_n = position_n < start + length
            token_n = tl.load(perm_T + position_n, mask=is_token_n, other=0).to(tl.int64)
            weights_nN = _embedded_weights(base_weights_TJ, base_ids_TJ, token_n, is_token_n, BASE_TOP_K, BASE_EXPERTS)
            used_N += _keep(weights_PX, position_n, is_token_n, weights_nN, EXPERTS, BASE_EXPERTS)
        _list_hits(hits_X, hit_count, counts_M, used_N, BASE_EXPERTS, COUNT)


@triton.jit(do_not_specialize=["layer"])
def shrink(
    pool_RD, page_index_I, layer_offset_LS, meta_S8,
    perm_T, tile_slot_N, tile_start_N, tile_len_N,
    x_TD, weights_PX, hits_NX, hit_counts_N, a_PW,
    layer, slots, hidden_size, width,
    TILE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The gated activations of one tile. Grid (N, G): program g of a tile makes every G-th block of BLOCK_C columns."""
    tile = tl.program_id(0)
    _, offset, meta_8, start, length = _found(
        tile, layer, slots, layer_offset_LS, meta_S8, tile_slot_N, tile_start_N, tile_len_N
    )
    variant = tl.load(meta_8 + VARIANT)
    experts = tl.load(meta_8 + NUM_EXPERTS)
    bottleneck = tl.load(meta_8 + BOTTLENECK)
    activation = tl.load(meta_8 + ACTIVATION)
    first_entry = tl.load(meta_8 + INDEX)
    token_n = _tokens(perm_T, start, length, TILE)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if offset < 0:
        return
    chooses = variant <= EMBEDDED
    down = offset + tl.where(variant == ROUTED, experts, 0)
    hits_X = hits_NX + tile * EXPERTS
    columns = tl.load(hit_counts_N + tile, mask=chooses, other=experts) * bottleneck
    position_n = start + tl.arange(0, TILE)
    is_token_n = tl.arange(0, TILE) < length
    step = tl.num_programs(1) * BLOCK_C
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_C = _expert(hits_X, c_C // bottleneck, chooses, EXPERTS)
    for _ in range(tl.program_id(1) * BLOCK_C, columns, step):
        is_column_C = c_C < columns
        rows_C = _pool_rows(page_index_I, first_entry, down + m_C * bottleneck + c_C % bottleneck, is_column_C)
        is_entry_nC = is_token_n[:, None] & is_column_C[None, :]
        weight_nC = tl.load(
            weights_PX + position_n[:, None] * EXPERTS + m_C[None, :], mask=is_entry_nC & chooses, other=1.0
        )
        z_nC = tl.zeros([TILE, BLOCK_C], tl.float32)
        for d in range(0, hidden_size, BLOCK_D):
            d_D = d + tl.arange(0, BLOCK_D)
            x_nD = _load_x(x_TD, token_n, is_token_n, d_D, hidden_size)
            down_DC = _load_columns(pool_RD, rows_C, is_column_C, d_D, hidden_size)
            z_nC = tl.dot(x_nD, down_DC, z_nC, input_precision="ieee")
        a_nC = tl.where(weight_nC != 0, _activate(z_nC, activation) * weight_nC, 0.0)
        tl.store(a_PW + position_n[:, None] * width + c_C[None, :], a_nC.to(a_PW.dtype.element_ty), mask=is_entry_nC)
        c_C += step
        m_C = _expert(hits_X, c_C // bottleneck, chooses, EXPERTS)


@triton.jit(do_not_specialize=["layer"])
def expand(
    pool_RD, page_index_I, layer_offset_LS, meta_S8,
    perm_T, tile_slot_N, tile_start_N, tile_len_N,
    output_TD, hits_NX, hit_counts_N, a_PW,
    layer, slots, hidden_size, width,
    TILE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add the delta of one tile into BLOCK_D columns of the output. Grid (N, D / BLOCK_D, rounded up)."""
    tile = tl.program_id(0)
    _, offset, meta_8, start, length = _found(
        tile, layer, slots, layer_offset_LS, meta_S8, tile_slot_N, tile_start_N, tile_len_N
    )
    variant = tl.load(meta_8 + VARIANT)
    experts = tl.load(meta_8 + NUM_EXPERTS)
    bottleneck = tl.load(meta_8 + BOTTLENECK)
    first_entry = tl.load(meta_8 + INDEX)
    token_n = _tokens(perm_T, start, length, TILE)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if offset < 0:
        return
    chooses = variant <= EMBEDDED
    up = offset + tl.where(variant == ROUTED, experts, 0) + experts * bottleneck
    hits_X = hits_NX + tile * EXPERTS
    i_n = tl.arange(0, TILE)
    is_token_n = i_n < length
    columns = tl.load(hit_counts_N + tile, mask=chooses, other=experts) * bottleneck
    c_C = tl.arange(0, BLOCK_C)
    m_C = _expert(hits_X, c_C // bottleneck, chooses, EXPERTS)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    output_nD = output_TD + token_n[:, None] * hidden_size + d_D[None, :]
    is_output_nD = is_token_n[:, None] & (d_D < hidden_size)[None, :]
    sum_nD = tl.load(output_nD, mask=is_output_nD, other=0.0)
    delta_nD = tl.zeros([TILE, BLOCK_D], tl.float32)
    for first in range(0, columns, BLOCK_C):
        is_column_C = first + c_C < columns
        rows_C = _pool_rows(page_index_I, first_entry, up + m_C * bottleneck + (first + c_C) % bottleneck, is_column_C)
        m_C = _expert(hits_X, (first + BLOCK_C + c_C) // bottleneck, chooses, EXPERTS)
        a_nC = tl.load(
            a_PW + (start + i_n)[:, None] * width + first + c_C[None, :],
            mask=is_token_n[:, None] & is_column_C[None, :],
            other=0.0,
        )
        up_CD = tl.load(
            pool_RD + rows_C[:, None] * hidden_size + d_D[None, :],
            mask=is_column_C[:, None] & (d_D < hidden_size)[None, :],
            other=0.0,
        )
        delta_nD = tl.dot(a_nC, up_CD, delta_nD, input_precision="ieee")
    sum_nD = sum_nD.to(tl.float32) + delta_nD
    tl.store(output_nD, sum_nD.to(output_TD.dtype.element_ty), mask=is_output_nD)


@triton.jit
def _found(tile, layer, slots, layer_offset_LS, meta_S8, tile_slot_N, tile_start_N, tile_len_N):
    """A tile's slot, the offset of its rows in the layer (-1: there are none), its meta data, its first position and
    its tokens. Where there is no slot the rest is of slot 0."""
    slot = tl.load(tile_slot_N + tile)
    start = tl.load(tile_start_N + tile)
    length = tl.load(tile_len_N + tile)
    known = tl.maximum(slot, 0)
    offset = tl.load(layer_offset_LS + layer * slots + known)
    return known, tl.where(slot < 0, -1, offset), meta_S8 + known * META_COLUMNS, start, length


@triton.jit
def _tokens(perm_T, start, length, TILE: tl.constexpr):
    """[n] int64: the tokens of a tile; 0 beyond its last."""
    i_n = tl.arange(0, TILE)
    return tl.load(perm_T + start + i_n, mask=i_n < length, other=0).to(tl.int64)


@triton.jit
def _route_own(
    pool_RD, page_index_I, meta_8, offset, perm_T, start, length, x_TD, base_logits_TN, weights_PX, hits_X, hit_count,
    counts_M, experts, hidden_size, base_experts,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    BASE_EXPERTS: tl.constexpr, HAS_LOGITS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """R: the weights and hits of the tile by the adapter's own router, which has up to WIDTH experts."""
    m_M = tl.arange(0, WIDTH)
    rows_M = _pool_rows(page_index_I, tl.load(meta_8 + INDEX), offset + m_M, m_M < experts)
    top_k = tl.load(meta_8 + TOP_K)
    flags = tl.load(meta_8 + FLAGS)
    used_M = tl.zeros([WIDTH], tl.int32)
    for first in range(0, length, TOKENS):
        position_n = start + first + tl.arange(0, TOKENS)
        is_token_n = position_n < start + length
        token_n = tl.load(perm_T + position_n, mask=is_token_n, other=0).to(tl.int64)
        logits_nM = tl.zeros([TOKENS, WIDTH], tl.float32)
        for d in range(0, hidden_size, BLOCK_D):
            d_D = d + tl.arange(0, BLOCK_D)
            x_nD = _load_x(x_TD, token_n, is_token_n, d_D, hidden_size)
            router_DM = _load_columns(pool_RD, rows_M, m_M < experts, d_D, hidden_size)
            logits_nM = tl.dot(x_nD, router_DM, logits_nM, input_precision="ieee")
        if HAS_LOGITS & ((flags & BASE_SLOT) != 0):
            base_nN = _base_logits(base_logits_TN, token_n, is_token_n, base_experts, BASE_EXPERTS)
            weights_nM = _slot_weights(logits_nM, experts, base_nN, base_experts, top_k, WIDTH, BASE_EXPERTS)
        else:
            weights_nM = _own_weights(logits_nM, experts, top_k, flags, WIDTH)
        used_M += _keep(weights_PX, position_n, is_token_n, weights_nM, EXPERTS, WIDTH)
    _list_hits(hits_X, hit_count, counts_M, used_M, WIDTH, COUNT)


@triton.jit
def _pool_rows(page_index_I, first_entry, row, is_row):
    """The rows of the pool, int64, of logical rows of a slot whose entries in the page index start at `first_entry`."""
    page = tl.load(page_index_I + first_entry + row // PAGE_ROWS, mask=is_row, other=0)
    return page.to(tl.int64) * PAGE_ROWS + row % PAGE_ROWS


@triton.jit
def _load_x(x_TD, token_n, is_token_n, d_D, hidden_size):
    """[n, block of D]: part of the tokens' rows, 0 beyond the last token and beyond D."""
    is_value_nD = is_token_n[:, None] & (d_D < hidden_size)[None, :]
    return tl.load(x_TD + token_n[:, None] * hidden_size + d_D[None, :], mask=is_value_nD, other=0.0)


@triton.jit
def _load_columns(pool_RD, rows_C, is_row_C, d_D, hidden_size):
    """[block of D, C]: part of some rows of the pool, as columns; rows that are masked are not read."""
    is_value_DC = is_row_C[None, :] & (d_D < hidden_size)[:, None]
    return tl.load(pool_RD + rows_C[None, :] * hidden_size + d_D[:, None], mask=is_value_DC, other=0.0)


@triton.jit
def _base_logits(base_logits_TN, token_n, is_token_n, base_experts, BASE_EXPERTS: tl.constexpr):
    """[n, BASE_EXPERTS] float32; what lies beyond N is no candidate for `_slot_weights`."""
    n_N = tl.arange(0, BASE_EXPERTS)
    is_one_nN = is_token_n[:, None] & (n_N < base_experts)[None, :]
    return tl.load(base_logits_TN + token_n[:, None] * base_experts + n_N[None, :], mask=is_one_nN, other=0.0).to(
        tl.float32
    )


@triton.jit
def _embedded_weights(
    base_weights_TJ, base_ids_TJ, token_n, is_token_n, BASE_TOP_K: tl.constexpr, BASE_EXPERTS: tl.constexpr
):
    """E: the weight that the base applies to each of its experts, [n, BASE_EXPERTS]; an id below 0 stands for none."""
    n_N = tl.arange(0, BASE_EXPERTS)
    weights_nN = tl.zeros([token_n.shape[0], BASE_EXPERTS], tl.float32)
    for j in tl.static_range(BASE_TOP_K):
        at_n = token_n * BASE_TOP_K + j
        id_n = tl.load(base_ids_TJ + at_n, mask=is_token_n, other=-1)
        weight_n = tl.load(base_weights_TJ + at_n, mask=is_token_n, other=0.0).to(tl.float32)
        weights_nN = tl.where(n_N[None, :] == id_n[:, None], weight_n[:, None], weights_nN)
    return weights_nN


@triton.jit
def _keep(weights_PX, position_n, is_token_n, weights_nM, EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """Store the weights of some positions; returns how many of them selected each expert, int32 [WIDTH]."""
    at_nM = position_n[:, None] * EXPERTS + tl.arange(0, WIDTH)[None, :]
    tl.store(weights_PX + at_nM, weights_nM, mask=is_token_n[:, None])
    return tl.sum(((weights_nM != 0) & is_token_n[:, None]).to(tl.int32), axis=0)


@triton.jit
def _list_hits(hits_X, hit_count, counts_M, used_M, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """List the experts that were selected, ascending, and add to their counts."""
    m_M = tl.arange(0, WIDTH)
    is_hit_M = (used_M > 0).to(tl.int32)
    tl.store(hits_X + tl.cumsum(is_hit_M, axis=0) - 1, m_M, mask=is_hit_M > 0)
    tl.store(hit_count, tl.sum(is_hit_M, axis=0))
    if COUNT:
        tl.atomic_add(counts_M + m_M, used_M, mask=is_hit_M > 0)


@triton.jit
def _expert(hits_X, e_C, chooses, EXPERTS: tl.constexpr):
    """The expert that each column belongs to, given its place e among those of the tile; any number beyond the last.

    It does not ask for how many there are: the two loads are on their way together.
    """
    return tl.where(chooses, tl.load(hits_X + e_C, mask=(e_C < EXPERTS) & chooses, other=0), e_C)


@triton.jit
def _activate(z, activation):
    if activation == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif activation == RELU:
        z = tl.where(z < 0, 0.0, z)  # unlike a maximum, it keeps a NaN
    elif activation == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def _candidates(logits_nX, count, WIDTH: tl.constexpr):
    """What a top-k compares: every candidate finite or +inf, a NaN first (its token is lost anyway); others -inf."""
    ordered_nX = tl.where(logits_nX != logits_nX, float("inf"), tl.where(logits_nX < LOWEST, LOWEST, logits_nX))
    return tl.where((tl.arange(0, WIDTH) < count)[None, :], ordered_nX, float("-inf"))


@triton.jit
def _softmax(logits_nX, count, WIDTH: tl.constexpr):
    """Softmax over the first `count` columns, 0 in the others; a NaN or +inf makes its whole row NaN."""
    is_one = (tl.arange(0, WIDTH) < count)[None, :]
    largest_n = tl.max(tl.where(is_one, logits_nX, float("-inf")), axis=1)
    exp_nX = tl.where(is_one, tl.exp(logits_nX - largest_n[:, None]), 0.0)
    return exp_nX / tl.sum(exp_nX, axis=1)[:, None]


@triton.jit
def _own_weights(logits_nX, experts, top_k, flags, EXPERTS: tl.constexpr):
    """R: the K largest of softmax over M, divided by their sum if the adapter renormalises; 0 where not selected."""
    m_X = tl.arange(0, EXPERTS)
    q_nX = _softmax(logits_nX, experts, EXPERTS)
    left_nX = _candidates(logits_nX, experts, EXPERTS)
    weights_nX = tl.zeros_like(q_nX)
    for _ in range(top_k):
        is_best_nX = m_X[None, :] == tl.argmax(left_nX, axis=1)[:, None]
        weights_nX = tl.where(is_best_nX, q_nX, weights_nX)
        left_nX = tl.where(is_best_nX, float("-inf"), left_nX)
    if (flags & RENORMALIZE) != 0:
        total_n = tl.sum(weights_nX, axis=1)  # may be NaN, which must not select the experts that have weight 0
        weights_nX = tl.where(weights_nX != 0, weights_nX / total_n[:, None], 0.0)
    return weights_nX


@triton.jit
def _slot_weights(
    logits_nX, experts, base_nN, base_experts, top_k, EXPERTS: tl.constexpr, BASE_EXPERTS: tl.constexpr
):  # fmt: skip
    """R with `base_slot`: the expert of the k-th largest logit gets the k-th largest probability of the base."""
    m_X = tl.arange(0, EXPERTS)
    n_N = tl.arange(0, BASE_EXPERTS)
    p_nN = _softmax(base_nN, base_experts, BASE_EXPERTS)
    left_nX = _candidates(logits_nX, experts, EXPERTS)
    left_nN = _candidates(base_nN, base_experts, BASE_EXPERTS)
    weights_nX = tl.zeros_like(logits_nX)
    for _ in range(top_k):
        is_largest_nN = n_N[None, :] == tl.argmax(left_nN, axis=1)[:, None]
        p_n = tl.sum(tl.where(is_largest_nN, p_nN, 0.0), axis=1)
        is_best_nX = m_X[None, :] == tl.argmax(left_nX, axis=1)[:, None]
        weights_nX = tl.where(is_best_nX, p_n[:, None], weights_nX)
        left_nX = tl.where(is_best_nX, float("-inf"), left_nX)
        left_nN = tl.where(is_largest_nN, float("-inf"), left_nN)
    return weights_nX
