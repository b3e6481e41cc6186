"""The package's front: laziness, merging, moving bytes, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier import kernels
from kvtier.kernels import (
    apply_sink_logits,
    copy_blocks,
    gather_rows,
    merge_many,
    merge_states,
    paged_attention,
    plan_step,
    reference,
    scatter_rows,
    to_device,
    write_kv,
)


def test_importing_the_package_loads_neither_torch_nor_triton():
    code = (
        "import sys, kvtier.kernels as k; assert 'torch' not in sys.modules; k.paged_attention; k.write_kv;"
        "assert 'torch' in sys.modules; assert 'triton' not in sys.modules, 'triton'; assert 'paged_decode' in dir(k)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_refused_with_the_names_there_are():
    import kvtier.kernels

    with pytest.raises(AttributeError, match="paged_attention"):
        kvtier.kernels.nothing  # noqa: B018


def states(parts: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results, some without keys and with NaN where their out should be."""
    torch.manual_seed(parts)
    outs, lses = torch.randn(parts, 7, 3, 20), 5 * torch.randn(parts, 7, 3)
    lses[:, 2, 1] = float("-inf")
    lses[0, 4:] = float("-inf")
    outs[torch.isneginf(lses)] = float("nan")
    return outs.to(dtype), lses


@pytest.mark.parametrize("parts", [1, 2, 5, 64])
def test_merge_many_is_exact(assert_close, parts):
    outs, lses = states(parts)
    assert_close(merge_many(outs, lses), reference.merge_many(outs, lses), 1e-6)


def test_merge_states_is_exact_in_any_order(assert_close):
    outs, lses = states(3)
    expected = reference.merge_many(outs, lses)
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        left = merge_states(outs[a], lses[a], outs[b], lses[b])
        assert_close(merge_states(*left, outs[c], lses[c]), expected, 1e-6)
    nothing = torch.zeros(7, 3, 20).double(), torch.full((7, 3), float("-inf")).double()
    assert_close(merge_many(outs[:0], lses[:0]), nothing)


def test_merge_keeps_the_dtype_of_the_first_state():
    outs, lses = states(2, torch.bfloat16)
    out, lse = merge_states(outs[0], lses[0], outs[1], lses[1])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert merge_states(outs[0].float(), lses[0], outs[1], lses[1])[0].dtype == torch.float32


def test_sink_logits_only_enlarge_the_denominator():
    outs, lses = states(2)
    sinks = torch.tensor([-3.0, 0.5, 40.0])
    out, lse = outs[1], lses[1]
    out = torch.where(torch.isneginf(lse)[..., None], 0.0, out)
    expected = reference.apply_sink_logits(out, lse, sinks)
    expected = torch.nan_to_num(expected)  # a row without keys stays 0
    assert torch.allclose(apply_sink_logits(out, lse, sinks).double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_rows_are_copied_gathered_and_scattered(dtype):
    pool = torch.randint(0, 100, (20, 48)).to(dtype)
    source, target = pool[:, 8:40], torch.zeros(9, 32, dtype=dtype)  # one layer's slice of each block
    expected = target.clone()
    reference.copy_blocks(source, expected, [3, 19, 3], [8, 0, 5])
    copy_blocks(source, target, [3, 19, 3], np.array([8, 0, 5]))
    assert torch.equal(target, expected)
    assert torch.equal(gather_rows(source, [4, 4, 0]), source[[4, 4, 0]])
    copy_blocks(source, target, [], [])
    assert torch.equal(target, expected)
    fresh = pool.clone()
    scatter_rows(target[:2], fresh[:, 8:40], torch.tensor([7, 2]))
    assert torch.equal(fresh[7, 8:40], target[0]) and torch.equal(fresh[2, 8:40], target[1])
    assert torch.equal(fresh[7, :8], pool[7, :8]) and torch.equal(fresh[5], pool[5])


def test_copy_on_write_inside_one_pool():
    pool = torch.arange(12.0).view(4, 3)
    copy_blocks(pool, pool, [1, 2], [3, 0])
    assert torch.equal(pool[3], pool[1]) and torch.equal(pool[0], pool[2])


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize("entry", [-1, 10_000])
def test_block_table_outside_the_pool_is_refused(make_case, monkeypatch, entry, debug):
    monkeypatch.setenv("KVTIER_DEBUG", debug)
    case = make_case([(1, 40), (5, 30)])
    case.table[1, 1] = entry
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        case.run(paged_attention)


def test_entries_past_the_length_are_not_looked_at(make_case, assert_close):
    case = make_case([(1, 40), (5, 30)])
    case.table[1, 2:] = 10_000
    assert_close(case.run(paged_attention), case.expected())


def test_spans_that_do_not_fit_are_refused(make_case):
    case = make_case([(1, 40), (5, 30)])
    for change, match in (
        (dict(kv_lens=[40, 4]), "kv_len"),
        (dict(cu_q=[0, 1, 5]), "cu_q"),
        (dict(cu_q=[0, 6]), "cu_q"),
        (dict(kv_lens=[40, 60]), "blocks"),
        (dict(q=case.q[:, :3]), "heads"),
        (dict(q=case.q[..., :8]), "head_dim"),
        (dict(v=case.v[:2]), "pages"),
        (dict(rules=dict(window=0)), "window"),
        (dict(rules=dict(sinks=-1)), "sinks"),
    ):
        bad = type(case)(**{**vars(case), **change})
        with pytest.raises(ValueError, match=match):
            bad.run(paged_attention)


def test_a_plan_serves_its_own_step_only(make_case, assert_close):
    case = make_case([(1, 40), (5, 30)])
    plan = plan_step(case.k, case.table, case.kv_lens, case.cu_q)
    assert_close(case.run(paged_attention, plan=plan), case.expected())
    case.q = case.q[:3]
    with pytest.raises(ValueError, match="covers"):
        case.run(paged_attention, plan=plan)


def test_write_kv_refuses_what_would_hit_other_tokens(make_case, monkeypatch):
    case = make_case([(0, 40)])
    new = torch.randn(2, 2, 16)
    last = case.k.shape[0] * 16 - 1
    write_kv(new, new, case.k, case.v, [last, -1])
    assert torch.equal(case.k[-1, :, -1], new[0])
    for slots in ([0, last + 1], [0, -2], [0]):
        with pytest.raises(ValueError, match="slots"):
            write_kv(new, new, case.k, case.v, slots)
    with pytest.raises(ValueError, match="fit"):
        write_kv(new[:, :1], new, case.k, case.v, [0, 1])
    monkeypatch.setenv("KVTIER_DEBUG", "1")
    with pytest.raises(ValueError, match="more than once"):
        write_kv(new, new, case.k, case.v, [7, 7])


def test_copies_that_do_not_fit_are_refused(monkeypatch):
    rows = torch.zeros(4, 8)
    for source, target, source_ids, target_ids in (
        (rows, rows[:, :4], [0], [0]),
        (rows, rows.double(), [0], [0]),
        (rows, rows, [4], [0]),
        (rows, rows, [0], [-1]),
        (rows, rows, [0, 1], [0]),
    ):
        with pytest.raises(ValueError):
            copy_blocks(source, target, source_ids, target_ids)
    monkeypatch.setenv("KVTIER_DEBUG", "1")
    with pytest.raises(ValueError, match="more than once"):
        copy_blocks(rows, rows.clone(), [0, 1], [2, 2])


def test_states_that_do_not_belong_together_are_refused():
    out, lse = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="differ"):
        merge_states(out, lse, out[:2], lse[:2])
    with pytest.raises(ValueError, match="lse"):
        merge_states(out, lse.double(), out, lse)
    with pytest.raises(ValueError, match="sink_logits"):
        apply_sink_logits(out, lse, torch.zeros(3))


def test_integers_reach_a_device_by_one_way():
    """Every other way waits for what the device is doing (kernels/uploads.py); on a CPU nobody would notice."""
    folder = Path(kernels.__file__).parent
    for path in [p for name in ("kernels", "engine", "tiers") for p in (folder.parent / name).glob("*.py")]:
        if path.name == "uploads.py" or path.name.startswith("reference"):
            continue
        found = re.findall(r"(?:from_numpy|as_tensor)\([^\n]*\)\.(?:to|cuda)\([^\n]*", path.read_text())
        assert not found, f"{path.name}: {found[0]}: use to_device"


def test_uploads_keep_values_and_take_what_callers_have():
    device = torch.device("cpu")
    for values in (range(3), [0, 1, 2], np.arange(3, dtype=np.int32), np.arange(5)[::2] // 2, torch.arange(3)):
        there = to_device(values, device, torch.int32)
        assert there.dtype == torch.int32 and there.tolist() == [0, 1, 2]
    assert to_device([], device).shape == (0,) and to_device(np.empty((0, 4)), device).shape == (0, 4)
