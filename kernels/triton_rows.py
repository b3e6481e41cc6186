"""Attention on compressed pages on a GPU: the loop over blocks, for formats that fold and formats of integers.

One kernel serves decode (one tile of rows, keys cut into splits) and prefill (many tiles): compressed blocks lie before
every row that attends to them, so no causal mask is ever needed. Guards: only whole blocks named by the table are read,
under a window only those that some row sees; page numbers are 64-bit before they meet a stride.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .formats import PageFormat
from .page_tiles import NARROW, page_cut
from .triton_common import IS_INTERPRETED, finish_lse, narrow, soften
from .triton_folded import fold_keys, fold_values
from .triton_hack import hack_keys, hack_values, round_weights


@triton.jit
def load_piece(
    q, offsets, row_ok, INDEX: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr
):
    """Load the channels [M, PIECE_P] of q that meet one piece of K; nothing if K has fewer pieces."""
    if INDEX < PIECES:
        column = tl.arange(0, PIECE_P)
        mask = row_ok[:, None] & (column < PIECE)[None, :]
        return tl.load(q + offsets[:, None] + INDEX * PIECE + column[None, :], mask=mask, other=0.0)
    else:
        return offsets


@triton.jit
def take_keys(
    scores, bias, q, steps, row_ok, bytes_, table, slot, INDEX: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ZEROS: tl.constexpr, HAS_ZERO: tl.constexpr, BITS: tl.constexpr,
    IS_FP8: tl.constexpr, IS_HACK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add the share of one piece of K's channels to the scores, in the way of the format."""
    if IS_HACK:
        return hack_keys(scores, q, steps, row_ok, bytes_, table, slot, INDEX, PIECE, GROUP, BLOCK, ZEROS, BITS), bias
    else:
        return fold_keys(scores, bias, q, bytes_, table, INDEX, PIECE, PIECE_P, ZEROS, HAS_ZERO, BITS, IS_FP8, COMPUTE)


@triton.jit
def load_bytes(at, PIECE: tl.constexpr, PIECE_P: tl.constexpr):
    """Load one piece of K's rows [PIECE_P, TILE]."""
    if PIECE < PIECE_P:
        return tl.load(at, mask=(tl.arange(0, PIECE_P) < PIECE)[:, None], other=0)
    else:
        return tl.load(at)


@triton.jit
def take_values(
    acc, codes, step, sums, decay, pages, table, slot, INDEX: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, HAS_ZERO: tl.constexpr,
    BITS: tl.constexpr, IS_FP8: tl.constexpr, IS_HACK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Take one piece of V's channels into its accumulator, in the way of the format."""
    if IS_HACK:
        return hack_values(
            acc, codes, step, sums, decay, pages, table, slot, INDEX, PIECE, PIECE_P, ROW, ZEROS, BITS
        )  # fmt: skip
    else:
        return fold_values(
            acc, codes, decay, pages, table, slot, INDEX, PIECE, PIECE_P, ROW, BLOCK, GROUP, ZEROS, HAS_ZERO, BITS,
            IS_FP8, COMPUTE,
        )  # fmt: skip


@triton.jit
def store_piece(
    out, acc, total, row_ok, INDEX: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    """Normalise one piece of channels and write it; a row without keys gives zeros."""
    column = tl.arange(0, PIECE_P)
    result = tl.where((total == 0)[:, None], 0.0, acc / tl.where(total == 0, 1.0, total)[:, None])
    at = out[:, None] + INDEX * PIECE + column[None, :]
    tl.store(at, narrow(result, out.dtype.element_ty, ROUND), mask=row_ok[:, None] & (column < PIECE)[None, :])


@triton.jit
def compressed_rows(
    q, steps, pages, words, table, turn_ids, kv_lens, ahead, cu_q, tile_sequence, tile_start, out, lse, scale_log2, softcap,
    q_row, q_head, q_turn, step_row, step_head, step_turn, page_bytes, page_words, table_row, out_row, out_head, out_split,
    lse_row, lse_head, group, head_blocks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    K_RECORD: tl.constexpr, K_ROW: tl.constexpr, K_PIECE: tl.constexpr, K_PIECE_P: tl.constexpr, K_PIECES: tl.constexpr,
    K_DIM: tl.constexpr, K_GROUP: tl.constexpr, K_SCALES: tl.constexpr, K_ZEROS: tl.constexpr,
    V_AT: tl.constexpr, V_RECORD: tl.constexpr, V_ROW: tl.constexpr, V_PIECE: tl.constexpr, V_PIECE_P: tl.constexpr,
    V_PIECES: tl.constexpr, V_GROUP: tl.constexpr, V_SCALES: tl.constexpr, V_ZEROS: tl.constexpr,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, IS_FP8: tl.constexpr, IS_HACK: tl.constexpr, TURNS: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Attend TOKENS query tokens times HEADS heads of one KV head to one split of a sequence's compressed blocks.

    Row i of a sequence sits at kv_len + ahead + i. Offsets *_SCALES, *_ZEROS are in float16 words, ZEROS after SCALES.
    With TURNS, q holds one rotated copy per turn and turn_ids names the turn of each block. With IS_HACK, q are int8
    codes, `steps` their step per partition, and a tile is one partition of V.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) // head_blocks
    sequence = tl.load(tile_sequence + tile).to(tl.int64)
    first_token = tl.load(tile_start + tile)
    begin = tl.load(cu_q + sequence)
    rows = tl.load(cu_q + sequence + 1) - begin
    length = tl.load(kv_lens + sequence)
    row = tl.arange(0, M)
    token = first_token + row // HEADS
    in_group = tl.program_id(1) % head_blocks * HEADS + row % HEADS
    row_ok = (row // HEADS < TOKENS) & (token < rows) & (in_group < group)
    heads = head * group + in_group
    at_row = (begin + token).to(tl.int64)
    at_q = at_row * q_row + heads * q_head
    at_steps = steps + at_row * step_row + heads * step_head
    q_0 = load_piece(q, at_q, row_ok, 0, K_PIECES, K_PIECE, K_PIECE_P)
    q_1 = load_piece(q, at_q, row_ok, 1, K_PIECES, K_PIECE, K_PIECE_P)
    q_2 = load_piece(q, at_q, row_ok, 2, K_PIECES, K_PIECE, K_PIECE_P)
    q_3 = load_piece(q, at_q, row_ok, 3, K_PIECES, K_PIECE, K_PIECE_P)
    first = 0
    sink_tiles = 0
    pos_q = token
    if WINDOW > 0:
        pos_q = length + tl.load(ahead + sequence) + token
        lowest = length + tl.load(ahead + sequence) + first_token - WINDOW + 1
        first = tl.minimum(tl.maximum(lowest, 0), length) // TILE * TILE
        sink_tiles = tl.minimum(tl.cdiv(SINKS, TILE), first // TILE)
    tiles = sink_tiles + (length - first) // TILE
    per_split = tl.cdiv(tiles, tl.num_programs(2))
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc_0 = tl.zeros([M, V_PIECE_P], tl.float32)
    acc_1 = tl.zeros([M, V_PIECE_P], tl.float32)
    acc_2 = tl.zeros([M, V_PIECE_P], tl.float32)
    acc_3 = tl.zeros([M, V_PIECE_P], tl.float32)
    in_tile, in_piece = tl.arange(0, TILE), tl.arange(0, K_PIECE_P)
    for i in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        start = i * TILE
        if WINDOW > 0:
            start = tl.where(i < sink_tiles, start, first + (i - sink_tiles) * TILE)
        at_block = sequence * table_row + start // BLOCK
        page = tl.load(table + at_block).to(tl.int64)
        if TURNS:
            turn = tl.load(turn_ids + at_block).to(tl.int64)
            at_turn = at_q + turn * q_turn
            q_0 = load_piece(q, at_turn, row_ok, 0, K_PIECES, K_PIECE, K_PIECE_P)
            q_1 = load_piece(q, at_turn, row_ok, 1, K_PIECES, K_PIECE, K_PIECE_P)
            q_2 = load_piece(q, at_turn, row_ok, 2, K_PIECES, K_PIECE, K_PIECE_P)
            q_3 = load_piece(q, at_turn, row_ok, 3, K_PIECES, K_PIECE, K_PIECE_P)
        slot = start % BLOCK + in_tile
        at_k = pages + page * page_bytes + head * K_RECORD + slot[None, :] * K_ROW + in_piece[:, None]
        bytes_ = load_bytes(at_k, K_PIECE, K_PIECE_P)
        keys = words + page * page_words + head * (K_RECORD // 2) + K_SCALES
        turned_steps = at_steps
        if TURNS and IS_HACK:
            turned_steps += turn * step_turn
        if not IS_FP8 and not IS_HACK:
            keys += start % BLOCK // K_GROUP * K_DIM
        scores = tl.zeros([M, TILE], tl.float32)
        bias = tl.zeros([M], tl.float32)
        scores, bias = take_keys(
            scores, bias, q_0, turned_steps, row_ok, bytes_, keys, slot, 0, K_PIECE, K_PIECE_P, K_GROUP, BLOCK, K_ZEROS,
            HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
        )  # fmt: skip
        if K_PIECES > 1:
            if BITS == 8:
                bytes_ = load_bytes(at_k + K_PIECE, K_PIECE, K_PIECE_P)
            scores, bias = take_keys(
                scores, bias, q_1, turned_steps, row_ok, bytes_, keys, slot, 1, K_PIECE, K_PIECE_P, K_GROUP, BLOCK, K_ZEROS,
                HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
            )  # fmt: skip
        if K_PIECES > 2:
            scores, bias = take_keys(
                scores, bias, q_2, turned_steps, row_ok, bytes_, keys, slot, 2, K_PIECE, K_PIECE_P, K_GROUP, BLOCK, K_ZEROS,
                HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
            )  # fmt: skip
            scores, bias = take_keys(
                scores, bias, q_3, turned_steps, row_ok, bytes_, keys, slot, 3, K_PIECE, K_PIECE_P, K_GROUP, BLOCK, K_ZEROS,
                HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
            )  # fmt: skip
        if IS_FP8:
            scores *= tl.load(keys).to(tl.float32) * (256.0 * scale_log2)
        else:
            scores = (scores + bias[:, None]) * scale_log2
        live = row_ok[:, None]
        if WINDOW > 0:
            pos = start + in_tile
            live = (pos_q[:, None] - pos[None, :] < WINDOW) | (pos[None, :] < SINKS)
        weights, decay, top = soften(scores, live, softcap, top, WINDOW > 0, SOFTCAP)
        total = total * decay + tl.sum(weights, 1)
        at_v = pages + page * page_bytes + V_AT + head * V_RECORD
        values = words + page * page_words + V_AT // 2 + head * (V_RECORD // 2) + V_SCALES
        codes, step, sums = weights, total, total
        if IS_HACK:
            values += start % BLOCK // V_GROUP * (V_PIECE * V_PIECES)
            codes, step, sums = round_weights(weights)
        acc_0 = take_values(
            acc_0, codes, step, sums, decay, at_v, values, slot, 0, V_PIECE, V_PIECE_P, V_ROW, BLOCK, V_GROUP, V_ZEROS,
            HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
        )  # fmt: skip
        if V_PIECES > 1:
            acc_1 = take_values(
                acc_1, codes, step, sums, decay, at_v, values, slot, 1, V_PIECE, V_PIECE_P, V_ROW, BLOCK, V_GROUP, V_ZEROS,
                HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
            )  # fmt: skip
        if V_PIECES > 2:
            acc_2 = take_values(
                acc_2, codes, step, sums, decay, at_v, values, slot, 2, V_PIECE, V_PIECE_P, V_ROW, BLOCK, V_GROUP, V_ZEROS,
                HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
            )  # fmt: skip
        if V_PIECES > 3:
            acc_3 = take_values(
                acc_3, codes, step, sums, decay, at_v, values, slot, 3, V_PIECE, V_PIECE_P, V_ROW, BLOCK, V_GROUP, V_ZEROS,
                HAS_ZERO, BITS, IS_FP8, IS_HACK, COMPUTE,
            )  # fmt: skip
    at_out = out + at_row * out_row + heads * out_head + split * out_split
    store_piece(at_out, acc_0, total, row_ok, 0, V_PIECE, V_PIECE_P, ROUND)
    if V_PIECES > 1:
        store_piece(at_out, acc_1, total, row_ok, 1, V_PIECE, V_PIECE_P, ROUND)
    if V_PIECES > 2:
        store_piece(at_out, acc_2, total, row_ok, 2, V_PIECE, V_PIECE_P, ROUND)
    if V_PIECES > 3:
        store_piece(at_out, acc_3, total, row_ok, 3, V_PIECE, V_PIECE_P, ROUND)
    tl.store(lse + at_row * lse_row + heads * lse_head + split, finish_lse(top, total), mask=row_ok)


def compressed_shape(fmt: PageFormat, group: int, rows: int, arch: int) -> dict[str, Any]:
    """Choose tile sizes and offsets for `rows` query rows per KV head; the same for the launcher and the report.

    Source: page_tiles.py, and the ahead-of-time report for the rest: K of 8 bits is taken in two pieces where heads are wide,
            since all of q and its scales at once spill.
    """
    keys, values, cut = fmt.keys, fmt.values, page_cut(fmt)
    m = max(16, min(cut.rows if arch >= 90 else cut.rows_before, triton.next_power_of_2(rows)))
    is_wide, is_decode = max(keys.dim, values.dim) > NARROW, m <= 16
    heads = min(group, m)
    tile = min(cut.tile if is_decode or not is_wide else 32, fmt.block)
    ahead = 2 if m > 64 or fmt.name == "fp8" else 3  # fp8 with three spills before sm_90
    if fmt.is_hack:
        tile = values.group
    elif keys.axis == "channel":
        tile = min(tile, keys.group)
    narrowest = 32 if fmt.is_hack else 16  # the shortest products of int8 and of 16-bit operands
    piece = keys.row_bytes // 2 if fmt.bits == 8 and keys.dim > 128 else keys.row_bytes
    return dict(
        HEADS=heads, TOKENS=m // heads, M=m, TILE=tile, BLOCK=fmt.block,
        K_RECORD=keys.record_bytes, K_ROW=keys.row_bytes,
        K_PIECE=piece, K_PIECE_P=max(narrowest, triton.next_power_of_2(piece)), K_PIECES=keys.dim // piece,
        K_DIM=keys.dim, K_GROUP=keys.group, K_SCALES=keys.scales_at // 2, K_ZEROS=(keys.zeros_at - keys.scales_at) // 2,
        V_AT=fmt.kv_heads * keys.record_bytes, V_RECORD=values.record_bytes, V_ROW=values.row_bytes,
        V_PIECE=values.piece, V_PIECE_P=max(16, triton.next_power_of_2(values.piece)),
        V_PIECES=values.dim // values.piece, V_GROUP=values.group, V_SCALES=values.scales_at // 2,
        V_ZEROS=(values.zeros_at - values.scales_at) // 2, BITS=fmt.bits, HAS_ZERO=keys.has_zeros,
        IS_FP8=fmt.name == "fp8", IS_HACK=fmt.is_hack, COMPUTE=operand_dtype(fmt),
        num_warps=cut.warps if is_decode else 8, num_stages=cut.stages if is_decode else ahead,
    )  # fmt: skip


def operand_dtype(fmt: PageFormat) -> tl.dtype:
    """Return the dtype in which codes meet q and p: the one that takes the fewest instructions to make from them."""
    if fmt.is_hack:
        return tl.int8
    if IS_INTERPRETED:
        return tl.float32
    return tl.float16 if fmt.name == "fp8" else tl.bfloat16
