"""The kernel that folds scales, in the interpreter: float32 arithmetic on every folded format."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.kernels import (
    PageFormat,
    compressed_attention,
    plan_pages,
    reference,
    reference_compressed,
    triton_compressed,
)
from kvtier.kernels.cpu_quant import hadamard, part_views
from kvtier.kernels.rope import plan_turns, turn_back
from kvtier.kernels.triton_hack import hack_keys

SPANS = [(1, 2, 2), (5, 1, 0), (1, 0, 4)]
FOLDED = ["fp8", "int8", "int4", "int2"]
RULES = [{}, dict(window=40, sinks=5), dict(softcap=2.0)]
SHAPES = [(64, (64, 64), 32), (16, (32, 64), 64), (32, (96, 96), 128), (32, (64, 32), 32)]  # block, dims, group


def run(case, *, splits=1, turns=None, out_dtype=torch.float32):
    plan = plan_pages(case.pages, case.fmt, case.table, case.kv_lens, case.cu_q, case.ahead, turns=turns)
    rules = dict(window=None, sinks=0, softcap=None) | case.rules
    q = case.q[None] if turns is None else turn_back(case.q, turns)
    return triton_compressed.compressed_attention(
        q, case.pages, case.fmt, plan, scale=case.scale, out_dtype=out_dtype, splits=splits, **rules
    )


@pytest.mark.parametrize(
    ("name", "shape"), [(name, SHAPES[(i + turn) % 4]) for i, name in enumerate(FOLDED) for turn in (0, 1)], ids=str
)
def test_ragged_batch_matches_the_reference(make_pages, assert_close, name, shape):
    block, dims, size = shape
    rules = RULES[SHAPES.index(shape) % 3]
    fmt = PageFormat(name, 1 if name == "int2" else 2, block, *dims, group=size)
    case = make_pages(fmt, SPANS, group=3, **rules)
    assert_close(run(case), case.expected(), 4e-6, 5e-6)


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("dims", [(256, 256), (192, 128)], ids=str)
def test_wide_heads_of_bytes_are_taken_in_two_pieces(make_pages, assert_close, name, dims):
    case = make_pages(PageFormat(name, 1, 32, *dims, group=128), SPANS[:2], group=3, outliers=3.0, softcap=2.0)
    assert_close(run(case), case.expected(), 4e-6, 5e-6)


def test_many_rows_take_several_tiles(make_pages, assert_close):
    case = make_pages(PageFormat("int4", 1, 32, 32, group=32), [(70, 2, 5)], group=2, window=60, sinks=3)
    assert_close(run(case), case.expected(), 4e-6, 5e-6)


@pytest.mark.parametrize(
    ("name", "rules"), [("hack8", RULES[0]), ("hack4", RULES[1]), ("hack2", RULES[2]), ("hack2", RULES[0])], ids=str
)
def test_integer_products_round_as_on_a_cpu(make_pages, assert_close, name, rules):
    """Both round q alike, so LSE agrees; p is rounded against another maximum, so out agrees up to that rounding."""
    case = make_pages(PageFormat(name, 1, 64, 64, group=64), SPANS, group=3, **rules)
    out, lse = run(case)
    expected_out, expected_lse = compressed_attention(
        case.q, case.pages, case.fmt, case.table, case.kv_lens, case.cu_q, case.ahead, scale=case.scale, **rules
    )
    if case.fmt.rotates:  # what compressed_attention does before it calls a kernel
        turned = type(case)(**{**vars(case), "q": case.q @ hadamard(64)})
        out, lse = run(turned)
    assert_close((out, lse), (expected_out.double(), expected_lse.double()), 3e-2, 1e-5)


@triton.jit
def scores_of(q, steps, pages, words, out, ROW: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
              SCALES: tl.constexpr, ZEROS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Score 16 rows against one page with the kernel's own step."""
    row, slot, column = tl.arange(0, 16), tl.arange(0, BLOCK), tl.arange(0, ROW)
    bytes_ = tl.load(pages + slot[None, :] * ROW + column[:, None])
    scores = tl.zeros([16, BLOCK], tl.float32)
    for field in tl.static_range(8 // BITS):
        codes = tl.load(q + row[:, None] * (ROW * 8 // BITS) + field * ROW + column[None, :])
        scores = hack_keys(
            scores, codes, steps + row, row < 16, bytes_, words + SCALES, slot, field, ROW, GROUP, BLOCK, ZEROS, BITS
        )
    tl.store(out + row[:, None] * BLOCK + slot[None, :], scores)


@pytest.mark.parametrize("name", ["hack8", "hack4", "hack2"])
def test_scores_are_the_integer_identity_exactly(name):
    torch.manual_seed(0)
    fmt = PageFormat(name, 1, 32, 128, group=128)
    pages = torch.randint(0, 256, (1, fmt.layer_bytes), dtype=torch.uint8)
    keys = part_views(pages, fmt)[0]
    pages[:, keys.part.record_bytes :] = 0  # V, which is not read here
    keys.scales.copy_(2.0 ** torch.randint(-2, 3, keys.scales.shape))
    keys.zeros.copy_(torch.randint(-20, 21, keys.zeros.shape) / 4)
    q, steps = torch.randint(-127, 128, (16, 128), dtype=torch.int8), torch.full((16,), 0.25)
    out, part = torch.empty(16, 32), keys.part
    scores_of[(1,)](
        q, steps, pages, pages.view(torch.float16), out, ROW=part.row_bytes, GROUP=part.group, BLOCK=32,
        SCALES=part.scales_at // 2, ZEROS=(part.zeros_at - part.scales_at) // 2, BITS=fmt.bits,
    )  # fmt: skip
    k = reference_compressed.read_pages(pages, fmt)[0][0, 0]
    assert torch.equal(out.double(), 0.25 * q.double() @ k.T)


@pytest.mark.parametrize("splits", [2, 5])
def test_any_number_of_splits_gives_the_same_numbers(make_pages, assert_close, splits):
    for rules in RULES[:2]:
        case = make_pages(PageFormat("int4", 1, 32, 32, group=32), [(1, 4, 0), (1, 1, 3), (1, 0, 0)], **rules)
        assert_close(run(case, splits=splits), case.expected(), 4e-6, 5e-6)


def test_bfloat16_output_loses_only_the_last_rounding(make_pages, assert_close):
    case = make_pages(PageFormat("int4", 1, 32, 32, group=32), [(2, 2, 0)])
    assert_close(run(case, out_dtype=torch.bfloat16), case.expected(), 2.0**-8, 5e-6)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_poison_is_felt_as_soon_as_a_table_is_wrong(make_pages):
    case = make_pages(PageFormat("int4", 1, 32, 32, group=32), [(1, 2, 0)])
    case.table[0, 1] = next(i for i in range(len(case.pages)) if i not in case.table)
    assert torch.isnan(run(case)[0]).any()


def test_pages_behind_the_window_are_never_read(make_pages, assert_close):
    case = make_pages(PageFormat("int8", 1, 32, 32, group=32), [(4, 6, 3)], window=50, sinks=4)
    expected = case.expected()
    case.pages[torch.from_numpy(case.table[0, 1:4]).long()] = 0xFF
    assert_close(run(case), expected, 4e-6, 5e-6)


def test_pages_beyond_two_gib_are_reached(make_pages, assert_close):
    """Page numbers times the row's bytes pass 2**31: offsets are 64-bit. The rows are 5 GiB of untouched addresses."""
    case = make_pages(PageFormat("int4", 1, 16, 32, group=32), [(1, 1, 0)])
    count, row = 1 << 16, 80_000
    memory = torch.empty((count - 1) * row + case.fmt.layer_bytes, dtype=torch.uint8)
    far = memory.as_strided((count, case.fmt.layer_bytes), (row, 1))
    far[-1] = case.pages[case.table[0, 0]]
    expected = case.expected()
    case.pages, case.table[0, 0] = far, count - 1
    assert_close(run(case), expected, 4e-6, 5e-6)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(FOLDED),
    block=st.sampled_from([16, 32]),
    group=st.sampled_from([1, 4, 5]),
    spans=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 50)), min_size=1, max_size=2),
    window=st.none() | st.integers(1, 100),
    sinks=st.integers(0, 40),
    splits=st.integers(1, 2),
    seed=st.integers(0, 1 << 16),
)
def test_any_step_matches_the_reference(
    make_pages, assert_close, name, block, group, spans, window, sinks, splits, seed
):
    case = make_pages(
        PageFormat(name, 1, block, 32, group=32), spans, group=group, seed=seed, window=window, sinks=sinks
    )
    if case.q.shape[0]:
        assert_close(run(case, splits=splits), case.expected(), 5e-6, 1e-5)


@pytest.mark.parametrize(("name", "dim"), [("int2", 32), ("int8", 192)])
def test_turned_queries_meet_each_block_with_its_own_rotation(make_pages, assert_close, name, dim):
    case = make_pages(PageFormat(name, 1, 32, dim, 32, group=32), [(2, 3, 1), (1, 2, 0)])
    inv_freq = 10_000.0 ** (-torch.arange(16) / 16)
    turns = plan_turns([[5, 0, 5], [-900, 5, 0]], inv_freq)
    out, lse = run(case, turns=turns)
    q = turn_back(case.q.double(), turns)
    parts = []
    for turn in range(len(turns.cos_sin)):  # the blocks of one turn alone, then merged
        tables = [case.table[s][: n // 32][turns.ids[s][: n // 32] == turn] for s, n in enumerate(case.kv_lens)]
        table = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(t) for t in tables], batch_first=True)
        lens = [32 * len(t) for t in tables]
        part = type(case)(**{**vars(case), **dict(q=q[turn], table=table, kv_lens=lens)})
        parts.append(part.expected())
    expected = reference.merge_many(torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts]))
    assert_close((out, lse), expected, 4e-6, 5e-6)
