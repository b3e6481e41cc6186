"""A decode step bound to a layer group: what the layer-by-layer way gives, written where it is said, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from kvtier.kernels import DecodeStep, plan_decode, plan_slots, plan_step

from kvtier.kernels import cpu_inplace, cpu_step  # isort: skip

RULES = [{}, dict(window=1), dict(window=40, sinks=3), dict(window=100, sinks=300)]
SPANS = {1: [(1, 300)], 3: [(1, 70), (1, 1), (1, 128)]}


def bound(case, slots) -> DecodeStep | None:
    plan = plan_step(case.k, case.table, case.kv_lens, case.cu_q)
    heads = case.q.shape[1]
    return plan_decode(*case.stack, plan, plan_slots(case.k, slots, len(slots)), query_heads=heads, **case.rules)


def last_slots(case) -> np.ndarray:
    """Where the newest token of each sequence lies."""
    block, last = case.k.shape[2], np.array(case.kv_lens) - 1
    return case.table[np.arange(len(last)), last // block] * block + last % block


def take_out(case, slots):
    """The newest tokens, as the model gives them; NaN where they were."""
    block, at = case.k.shape[2], torch.from_numpy(slots)
    new = [pool[at // block, :, at % block].transpose(0, 1)[None].clone() for pool in (case.k, case.v)]
    for pool in (case.k, case.v):
        pool[at // block, :, at % block] = float("nan")
    return new


@pytest.mark.parametrize("num_rows", SPANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_gives_what_the_reference_gives_and_writes_one_slot_each(make_case, monkeypatch, num_rows, dtype):
    monkeypatch.setattr(cpu_inplace, "MAX_RUN_PAGES", 3)
    for rules, order, block in product(RULES, ("scattered", "runs"), (16, 64)):
        case = make_case(SPANS[num_rows], dtype=dtype, block=block, order=order, **rules)
        expected, slots = case.expected()[0], last_slots(case)
        before = [pool.clone() for pool in case.stack]
        key, value = take_out(case, slots)
        out = bound(case, slots).layer(1, case.q.transpose(0, 1)[None], key, value, case.scale)
        assert out.dtype == dtype
        tolerance = 2e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(out[0].double(), expected, atol=tolerance, rtol=tolerance)
        assert all(torch.equal(pool.nan_to_num(), old.nan_to_num()) for pool, old in zip(case.stack, before))


@pytest.mark.parametrize("is_slow", [True, False])
@pytest.mark.parametrize("length", [300, 9])
def test_a_single_row_given_twice_is_the_same_row(make_case, monkeypatch, length, is_slow):
    monkeypatch.setattr(cpu_step, "is_slow_with_one_row", lambda dtype: is_slow)
    case = make_case([(1, length)], dtype=torch.bfloat16, group=1, block=16, order="runs")
    expected, slots = case.expected()[0], last_slots(case)
    key, value = take_out(case, slots)
    step = bound(case, slots)
    assert isinstance(step, cpu_step.OneRow)
    out = step.layer(1, case.q.transpose(0, 1)[None], key, value, case.scale)
    assert out[0].shape == expected.shape
    torch.testing.assert_close(out[0].double(), expected, atol=8e-3, rtol=8e-3)


def test_pages_in_short_runs_are_gathered(make_case, monkeypatch):
    monkeypatch.setattr(cpu_inplace, "GATHER_US", 0.0)
    monkeypatch.setattr(cpu_inplace, "GATHER_HEAD_US", 0.0)
    monkeypatch.setattr(cpu_inplace, "CALL_US", 1e6)
    case = make_case([(1, 300), (1, 200)])
    expected, slots = case.expected()[0], last_slots(case)
    key, value = take_out(case, slots)
    step = bound(case, slots)
    assert step._reading.gathers
    out = step.layer(1, case.q.transpose(0, 1)[None], key, value, case.scale)
    torch.testing.assert_close(out[0].double(), expected, atol=2e-6, rtol=2e-6)


def test_what_it_does_not_cover_is_left_to_the_other_way(make_case):
    for spans, dims in (([(2, 40)], (16, 16)), ([(1, 40), (3, 30)], (16, 16)), ([(1, 40)], (16, 32))):
        case = make_case(spans, dims=dims)
        assert bound(case, np.arange(case.cu_q[-1])) is None
    case = make_case([(1, 40)])
    assert bound(case, np.array([-1])) is None


def test_rows_of_another_shape_are_refused(make_case):
    case = make_case([(1, 40)])
    step = bound(case, last_slots(case))
    with pytest.raises(ValueError, match="do not fit"):
        step.layer(1, case.q.transpose(0, 1)[None], torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16), 1.0)


def shortened(case, held):
    """The case as its last blocks hold so many tokens each: lengths and slots."""
    block = case.k.shape[2]
    lens = np.array([(n - 1) // block * block + h for n, h in zip(case.kv_lens, held, strict=True)])
    rows = np.arange(len(lens))
    return lens, case.table[rows, (lens - 1) // block] * block + (lens - 1) % block


@pytest.mark.parametrize("spans", [[(1, 300)], [(1, 10)], [(1, 77), (1, 5), (1, 128)]], ids=str)
def test_a_step_that_follows_gives_what_one_planned_anew_gives(make_case, spans):
    case = make_case(spans, block=64, order="runs")
    first, slots = shortened(case, [3] * len(spans))
    for pool in case.stack:
        pool.copy_(torch.randn(pool.shape))
    step = bound(replace(case, kv_lens=first.tolist()), slots)
    for held in ([4] * len(spans), [40, 5, 6][: len(spans)], [64] * len(spans), [2] * len(spans)):
        lens, slots = shortened(case, held)
        later = replace(case, kv_lens=lens.tolist())
        key, value = take_out(later, slots)
        for pool in (case.k, case.v):  # what lies behind the ends is read by nobody
            for n, page in zip(lens, case.table[np.arange(len(lens)), (lens - 1) // 64]):
                pool[page, :, (n - 1) % 64 + 1 :] = float("nan")
        assert step.follow(case.table, lens, slots)
        q = case.q.transpose(0, 1)[None]
        out = step.layer(1, q, key, value, case.scale)
        assert out.isfinite().all()
        torch.testing.assert_close(out, bound(later, slots).layer(1, q, key, value, case.scale), atol=1e-6, rtol=1e-6)
        for pool in case.stack:
            pool.nan_to_num_(0.5)


def test_only_a_later_step_over_the_same_pages_follows(make_case):
    case = make_case([(1, 70), (1, 20)], block=16)
    lens, slots = shortened(case, [6, 4])
    step = bound(case, last_slots(case))
    other = case.table.copy()
    other[0, 1] = other[1, 1]
    assert not step.follow(other, lens, slots), "another page"
    assert not step.follow(case.table[:, :-1], lens, slots), "fewer blocks"
    assert not step.follow(case.table, lens + np.array([16, 0]), slots), "a block further"
    assert not step.follow(case.table, lens - np.array([16, 0]), slots), "a block before"
    assert not step.follow(case.table, lens, slots + 1), "written where its sequence does not end"
    assert not step.follow(case.table, lens, slots[::-1].copy()), "written to each other's pages"
    assert step.follow(case.table, lens, slots)


def test_a_step_with_a_window_or_at_a_blocks_end_is_planned_anew(make_case):
    for length, rules in ((70, dict(window=40)), (80, {})):
        case = make_case([(1, length)], block=16, **rules)
        assert not bound(case, last_slots(case)).follow(case.table, np.array([length]), last_slots(case))
