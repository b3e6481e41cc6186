"""The CUDA backend: why it is refused without a device; with one, its contract, its three copy paths and its memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.tiers.copy_plan import plan_copy, row_space
from kvtier.tiers.cuda import COPY_PATHS, CudaBackend, unavailable_reason
from kvtier.tiers.errors import ConfigError, TierUnavailableError, UnpackableError
from kvtier.tiers.exported import export_rows
from kvtier.tiers.formats import block_formats
from kvtier.tiers.host import HostMemory
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.machine import Machine
from kvtier.tiers.memcpy_batch import (
    MAX_DESCRIPTORS,
    CopyAttributes,
    DriverError,
    MemcpyBatch,
    driver_too_old_for,
    driver_version,
)
from kvtier.tiers.packed_slab import PackedSlab
from kvtier.tiers.streams import copy_rows_now

sys.path.insert(0, str(Path(__file__).parent))
from test_streams import BackendContract

REASON = unavailable_reason()
without_gpu = pytest.mark.skipif(REASON is None, reason="there is a CUDA device here")


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(REASON is not None, reason=f"no usable CUDA: {REASON}")(test))


# ---------------------------------------------------------------------- without a device
@without_gpu
def test_the_reason_is_one_line_and_the_backend_refuses_with_it():
    assert REASON and "\n" not in REASON
    with pytest.raises(ConfigError) as refusal:
        CudaBackend()
    assert REASON in str(refusal.value)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_a_torch_without_cuda_is_named():
    assert f"torch {torch.__version__} is built without CUDA" == REASON


@pytest.mark.skipif(driver_version() != 0, reason="there is an NVIDIA driver here")
def test_without_a_driver_nothing_is_batched():
    with pytest.raises(DriverError, match="no NVIDIA driver"):
        MemcpyBatch()
    assert driver_too_old_for("13.2", "CuPy") == (
        "the NVIDIA driver is too old: it supports CUDA 0.0, CuPy is built for 13.2"
    )


def test_attributes_lie_as_the_driver_expects_them():
    offsets = [getattr(CopyAttributes, name).offset for name, _ in CopyAttributes._fields_]
    assert (ctypes.sizeof(CopyAttributes), offsets) == (24, [0, 4, 12, 20])  # CUmemcpyAttributes of cuda.h 13.0


# ---------------------------------------------------------------------- with a device
class CudaContract(BackendContract):
    """The contract of every backend, on one copy path."""

    path = None

    def make(self):
        return CudaBackend(copy_path=self.path)


@gpu
class TestBatch(CudaContract):
    path = "batch"


@gpu
class TestRuns(CudaContract):
    path = "runs"


@gpu
class TestTorch(CudaContract):
    path = "torch"


@pytest.fixture
def backend():
    made = CudaBackend()
    yield made
    made.close(10)


def bytes_of(random: np.random.Generator, rows: np.ndarray) -> None:
    rows[:] = random.integers(0, 256, rows.shape, np.uint8)


@gpu
@pytest.mark.parametrize("path", COPY_PATHS)
@pytest.mark.parametrize("columns", [slice(0, 768), slice(128, 640)], ids=["rows", "slices"])
def test_every_copy_path_gives_the_bytes_of_a_plain_copy(path, columns, seed):
    random, backend = np.random.default_rng(seed), CudaBackend(copy_path=path)
    count = 2 * MAX_DESCRIPTORS + 100
    source, back = backend.alloc_host(count + 50, 768), backend.alloc_host(count, 768)
    device = backend.alloc_device(count + 20, 768)
    bytes_of(random, source)
    t, s = random.permutation(count + 20)[:count], random.integers(0, count + 50, count)
    t[: count // 2] = np.sort(t[: count // 2])
    s[: count // 2] = t[: count // 2]
    expected = np.zeros((count + 20, 768), np.uint8)
    copy_rows_now(expected[:, columns], t, source[:, columns], s)
    backend.promote.copy_rows(device[:, columns], t, source[:, columns], s)
    event = backend.promote.record()
    assert event.wait(60) and event.error is None
    assert np.array_equal(device.cpu().numpy(), expected)
    backend.demote.copy_rows(back[:, columns], np.arange(count), device[:, columns], t)
    event = backend.demote.record()
    assert event.wait() and event.error is None
    assert np.array_equal(back[:, columns], expected[t][:, columns])
    assert not back[:, columns.stop :].any() and not back[:, : columns.start].any()
    backend.close(10)


@gpu
@pytest.mark.parametrize("path", COPY_PATHS)
def test_a_thread_may_copy_as_its_first_act_on_the_device(path):
    backend, seen = CudaBackend(copy_path=path), []
    host, pool, one = backend.alloc_host(1, 64), backend.alloc_device(1, 64), np.zeros(1, np.int64)
    host[:] = 5

    def copy() -> None:
        backend.promote.copy_rows(pool, one, host, one)
        event = backend.promote.record()
        seen.append((event.wait(60), event.error))

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join(20)
    assert seen == [(True, None)] and (pool == 5).all()
    backend.close(5)


@gpu
def test_blocks_are_copied_within_the_device_on_the_compute_stream(backend):
    pool = backend.alloc_device(4, 4096)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            pool[1] = 7
            backend.compute.copy_rows(pool, np.array([3]), pool, np.array([1]))
            assert backend.compute.record().wait(60)
        assert (pool[3] == 7).all() and not pool[2].any()
        pool.zero_()
        torch.cuda.synchronize()


@gpu
def test_the_slab_is_exact_zeroed_and_page_locked(backend):
    for rows, row_bytes in ((3, 100), (1, 1), (5, (2 << 20) + 4096), (0, 64)):
        slab = backend.alloc_host(rows, row_bytes)
        assert slab.nbytes == rows * row_bytes and slab.flags.writeable and not slab.any()
        if rows:
            assert slab.ctypes.data % 4096 == 0 and torch.from_numpy(slab).is_pinned()


@gpu
def test_host_memory_is_placed_near_the_device_and_pinned(backend):
    assert backend.near_node is None or backend.near_node in Machine().memory_nodes()
    memory = HostMemory(backend)
    slab = memory.alloc(4, 1 << 20)
    memory.start_prefault()
    assert torch.from_numpy(slab).is_pinned() and not slab.any()
    assert memory.status()["prefault"] == "pinned" and memory.status()["prefaulted_bytes"] == slab.nbytes
    memory.close()


@gpu
def test_more_memory_than_there_is_is_refused_by_name(backend):
    with pytest.raises(ConfigError, match="device_bytes"):
        backend.alloc_device(1 << 20, 1 << 30)
    with pytest.raises(ConfigError, match="host_bytes"):
        backend.alloc_host(1 << 20, 1 << 30)
    assert backend.alloc_host(1, 4096).nbytes == backend.alloc_device(1, 4096).nbytes == 4096


@gpu
def test_a_copy_out_waits_for_the_kernels_before_it(backend):
    pool, host = backend.alloc_device(8, 1 << 20), backend.alloc_host(8, 1 << 20)
    work = torch.randn(4096, 4096, device="cuda")
    rows = np.random.default_rng(0).permutation(8)
    for value in range(1, 20):
        for _ in range(4):
            work = torch.nn.functional.normalize(work @ work)
        pool.fill_(value)
        backend.demote.wait(backend.compute.record())
        backend.demote.copy_rows(host, rows, pool, rows)
        copied = backend.demote.record()
        backend.compute.wait(copied)  # the next fill
        assert copied.wait(30) and (host == value).all()


@gpu
def test_blocks_that_a_format_cannot_hold_are_named_by_the_event_of_their_copy(backend):
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_size=64, dtype="bfloat16")
    fmt = block_formats("int4", [layout], name="host")[0]
    slab = PackedSlab(fmt, 8, HostMemory(backend), backend)
    pool, pages, slots = backend.alloc_device(6, layout.block_bytes), np.array([4, 1, 2]), np.array([0, 7, 3])
    values = pool.view(torch.bfloat16)
    values.normal_()
    values[1, 100], values[2, -1] = float("nan"), 1e30
    backend.demote.wait(backend.compute.record())
    slab.put(backend.demote, slots, pool, pages)
    event = backend.demote.record()
    assert event.wait(60) and isinstance(event.error, UnpackableError) and event.error.rows.tolist() == [1, 2]
    slab.put(backend.demote, slots[:1], pool, pages[:1])
    event = backend.demote.record()
    assert event.wait(60) and event.error is None
    kept = torch.from_numpy(slab.read(slots[:1])).view(torch.bfloat16)
    assert (kept - values[4].cpu()).abs().max() < 0.6


@gpu
def test_a_device_copy_waits_for_host_work(backend):
    host, pool, one = backend.alloc_host(1, 64), backend.alloc_device(1, 64), np.zeros(1, np.int64)

    def read() -> None:
        time.sleep(0.05)
        host[:] = 9

    backend.promote.wait(backend.read_io.submit(read))
    backend.promote.copy_rows(pool, one, host, one)
    assert backend.promote.record().wait(60) and (pool == 9).all()


@gpu
def test_completions_are_reported_without_being_asked(backend):
    seen = []
    backend.on_progress = lambda: seen.append(1)
    host, pool = backend.alloc_host(64, 1 << 20), backend.alloc_device(64, 1 << 20)
    for _ in range(10):
        backend.promote.copy_rows(pool, np.arange(64), host, np.random.default_rng(0).permutation(64))
        event = backend.promote.record()
        deadline_s = time.monotonic() + 10
        while not event.is_done() and time.monotonic() < deadline_s:
            backend.wait_any(0.5)
        assert event.is_done()
    time.sleep(0.05)
    assert seen


@gpu
def test_rows_that_do_not_fit_are_refused_and_a_closed_stream_takes_nothing(backend):
    host, pool = backend.alloc_host(2, 64), backend.alloc_device(2, 64)
    with pytest.raises(ValueError, match="source_rows"):
        backend.promote.copy_rows(pool, np.array([0]), host, np.array([2]))
    event = backend.promote.record()
    assert event.wait(60) and event.error is None
    backend.close(5)
    with pytest.raises(TierUnavailableError, match="closed"):
        backend.promote.copy_rows(pool, np.array([0]), host, np.array([0]))


@gpu
def test_batches_refuse_the_legacy_default_stream(backend):
    pool = backend.alloc_device(2, 64)
    plan = plan_copy(row_space(pool), np.array([1]), row_space(pool), np.array([0]))
    with pytest.raises(DriverError, match="legacy"):
        MemcpyBatch().submit(plan.descriptors(), 0)


@gpu
def test_an_unknown_copy_path_is_refused():
    with pytest.raises(ConfigError, match="batch, runs, torch"):
        CudaBackend(copy_path="fastest")


COPIER = """
import sys
import numpy as np
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.exported import CUDA, map_exported

def ended(stream):
    event = stream.record()
    assert event.wait(60) and event.error is None, event.error

backend, slab = CpuBackend(), np.full((2, 4096), 7, np.uint8)
mapped = map_exported(CUDA, bytes.fromhex(sys.argv[1]), None, 4, 4096, backend, slab)
mapped.promote.copy_rows(mapped.rows, np.array([3]), slab, np.array([0]))
ended(mapped.promote)
mapped.demote.copy_rows(slab, np.array([1]), mapped.rows, np.array([1]))
ended(mapped.demote)
assert (slab[1] == 9).all()
mapped.close()
backend.close(5)
"""


@gpu
def test_another_process_copies_by_the_handle_of_a_pool(backend):
    try:
        exported = export_rows(backend, 4, 4096)
    except ConfigError as error:
        pytest.skip(f"no IPC here: {error}")
    exported.rows[1] = 9
    torch.cuda.synchronize()
    command = [sys.executable, "-c", COPIER, exported.handle.hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (exported.rows[3] == 7).all() and not exported.rows[2].any()
    exported.close()
