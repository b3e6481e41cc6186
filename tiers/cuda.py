"""CUDA backend: torch streams and events, a pinned slab from CuPy, and three ways to submit one copy of many rows.

The only module that imports CuPy or touches `torch.cuda`; `backends.get_backend` imports it where a device was found.
Copies run on their own non-blocking streams, one per direction. One thread polls their events and says that something
has ended: never a Python callback from a CUDA host function, which would hold the driver's lock while it waits for the
interpreter's. Ladder of submission: `batch` (cuMemcpyBatchAsync, one call for up to 4,096 descriptors), `runs`
(cudaMemcpyAsync per run of neighbouring rows, 2-D where rows are slices), `torch` (copy_ per run).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .copies import Descriptors, Rows2D, Runs, plan_copies
from .cpu import READ_WORKERS, WRITE_WORKERS, Workers
from .errors import ConfigError
from .streams import Event, IntArray, Progress, Rows, aligned_rows

COPY_PATHS = ("batch", "runs", "torch")
BATCH_LIMIT = 4096  # descriptors per call; more were seen to fail
BATCH_VERSION = 12080  # CUDA 12.8, whose ABI (nine arguments) the driver keeps under this number
_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: the source is read in stream order, not at submission
_POLL_S, _SLOWEST_POLL_S = 20e-6, 500e-6
_MEMCPY_DEFAULT = 4  # cudaMemcpyDefault: the direction follows from the addresses


def unavailable_reason() -> str | None:
    """What stands in the way of this backend, or None. Never raises."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 1:
            return "CuPy sees no CUDA device"
    except Exception as error:  # CuPy raises its own errors for a missing or too old driver
        return f"CuPy cannot be used: {error}"
    return None


class CudaEvent:
    """An event of a CUDA stream."""

    def __init__(self, event: Any) -> None:
        self.event = event
        self.error: BaseException | None = None

    def is_done(self) -> bool:
        try:
            return bool(self.event.query())
        except RuntimeError as error:  # an earlier copy or kernel failed: over, and its bytes mean nothing
            self.error = error
            return True

    def wait(self, timeout_s: float | None = None) -> bool:
        if timeout_s is None:
            try:
                self.event.synchronize()
            except RuntimeError as error:
                self.error = error
            return True
        deadline_s, pause_s = time.monotonic() + timeout_s, _POLL_S
        while not self.is_done():
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _SLOWEST_POLL_S)
        return True


class Watcher:
    """One thread that polls the events of copies and tells the pager when one is over."""

    def __init__(self, device: int, notify: Callable[[], None]) -> None:
        self._device, self._notify = device, notify
        self._changed = threading.Condition()
        self._events: list[CudaEvent] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kvtier-cuda-events", daemon=True)
        self._thread.start()

    def watch(self, event: CudaEvent) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        pause_s = _POLL_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._is_closing)
                if self._is_closing:
                    return
                events = list(self._events)
            over = [event for event in events if event.is_done()]
            if over:
                with self._changed:
                    self._events = [event for event in self._events if event not in over]
                self._notify()
                pause_s = _POLL_S
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _SLOWEST_POLL_S)


class CudaStream:
    """A copy stream, or (without a stream of its own) whatever stream the calling thread computes on."""

    def __init__(self, name: str, copier: Copier, own: Any, watch: Callable[[CudaEvent], None] | None) -> None:
        self.name = name
        self._copier, self._own, self._watch = copier, own, watch

    @property
    def stream(self) -> Any:
        return self._own if self._own is not None else torch.cuda.current_stream(self._copier.device)

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        self._copier.copy(self.stream, target, np.array(target_rows), source, np.array(source_rows))

    def run(self, fn: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            fn()

    def wait(self, event: Event) -> None:
        if isinstance(event, CudaEvent):
            self.stream.wait_event(event.event)
        else:
            event.wait()

    def record(self) -> CudaEvent:
        event = CudaEvent(torch.cuda.Event(blocking=True))
        event.event.record(self.stream)
        if self._watch is not None:
            self._watch(event)
        return event

    def synchronize(self, timeout_s: float | None = None) -> bool:
        return self.record().wait(timeout_s)


class Copier:
    """Submits copies of rows. `path` is the best rung of the ladder that works here, or the one asked for."""

    def __init__(self, device: int, path: str | None) -> None:
        self.device = device
        self._batch = _batch_function() if path in (None, "batch") else None
        self.path = path or ("batch" if self._batch is not None and self._batch_works() else "runs")
        if self.path == "batch" and self._batch is None:
            raise ConfigError("copy_path='batch': this driver has no cuMemcpyBatchAsync (CUDA 12.8); use 'runs'")

    def copy(self, stream: Any, target: Rows, t: IntArray, source: Rows, s: IntArray) -> None:
        if not len(t):
            return
        with torch.cuda.device(self.device):
            if self.path == "torch":
                _copy_by_torch(stream, target, t, source, s)
                return
            into, out_of = Rows2D.of(target), Rows2D.of(source)
            descriptors, runs = plan_copies(into, t, out_of, s)
            if self.path == "batch" and stream.cuda_stream != 0:  # it refuses the legacy default stream
                for part in descriptors.batches(BATCH_LIMIT):
                    self._submit_batch(part, stream.cuda_stream)
            else:
                _copy_by_runs(stream.cuda_stream, into, out_of, descriptors, runs)

    def _submit_batch(self, part: Descriptors, stream: int) -> None:
        """Pointers of the arrays go straight to the driver; it reads them before it returns."""
        assert self._batch is not None
        attributes = _MemcpyAttributes(srcAccessOrder=_STREAM_ORDER)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (part.targets, part.sources, part.sizes)]
        result = self._batch(
            *pointers,
            ctypes.c_size_t(len(part)),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            ctypes.byref(failed),
            ctypes.c_void_p(stream),
        )
        if result != 0:
            raise RuntimeError(f"cuMemcpyBatchAsync of {len(part)} copies failed with CUDA error {result}")

    def _batch_works(self) -> bool:
        """Copy a few rows to the device and back, and look at them."""
        stream = torch.cuda.Stream(self.device)
        there = torch.zeros(4, 64, dtype=torch.uint8, device=f"cuda:{self.device}")
        source, back = pinned_rows(4, 64), pinned_rows(4, 64)
        source[:] = np.arange(4)[:, None] + 1
        torch.cuda.current_stream(self.device).synchronize()
        try:
            for target, source_rows in ((there, source), (back, there)):
                same = np.array([3, 1])
                part, _ = plan_copies(Rows2D.of(target), same, Rows2D.of(source_rows), same)
                self._submit_batch(part, stream.cuda_stream)
            stream.synchronize()
        except RuntimeError:
            return False
        return bool((back[[3, 1]] == source[[3, 1]]).all())


def _copy_by_runs(stream: int, target: Rows2D, source: Rows2D, descriptors: Descriptors, runs: Runs) -> None:
    from cupy.cuda import runtime

    if target.is_dense and source.is_dense:
        for t, s, n in zip(
            descriptors.targets.tolist(), descriptors.sources.tolist(), descriptors.sizes.tolist(), strict=True
        ):
            runtime.memcpyAsync(t, s, n, _MEMCPY_DEFAULT, stream)
        return
    for t, s, n in zip(runs.targets.tolist(), runs.sources.tolist(), runs.counts.tolist(), strict=True):
        into, out_of = target.address + t * target.stride, source.address + s * source.stride
        runtime.memcpy2DAsync(into, target.stride, out_of, source.stride, target.width, n, _MEMCPY_DEFAULT, stream)


def _copy_by_torch(stream: Any, target: Rows, t: IntArray, source: Rows, s: IntArray) -> None:
    into, out_of = _tensor(target), _tensor(source)
    _, runs = plan_copies(Rows2D.of(target), t, Rows2D.of(source), s)
    with torch.cuda.stream(stream):
        for first, origin, n in zip(runs.targets.tolist(), runs.sources.tolist(), runs.counts.tolist(), strict=True):
            into[first : first + n].copy_(out_of[origin : origin + n], non_blocking=True)


def _tensor(rows: Rows) -> torch.Tensor:
    return rows if isinstance(rows, torch.Tensor) else torch.from_numpy(rows)


class _MemcpyAttributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h: access order, two location hints (type, id), flags."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", ctypes.c_int * 2),
        ("dstLocHint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def _batch_function() -> Any:
    """The driver's cuMemcpyBatchAsync, or None. Asked for by version, so that its arguments are those we pass."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        address, status = ctypes.c_void_p(), ctypes.c_int()
        result = driver.cuGetProcAddress_v2(
            b"cuMemcpyBatchAsync",
            ctypes.byref(address),
            ctypes.c_int(BATCH_VERSION),
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
    except (OSError, AttributeError):
        return None
    if result != 0 or status.value != 0 or not address.value:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    return ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer)(
        address.value
    )


def pinned_rows(rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed page-locked host rows of exactly that size (a caching allocator would round up to a power of two)."""
    from cupy.cuda import PinnedMemory, PinnedMemoryPointer

    size = rows * row_bytes
    if size == 0:
        return aligned_rows(rows, row_bytes)
    memory = np.frombuffer(PinnedMemoryPointer(PinnedMemory(size), 0), np.uint8, size).reshape(rows, row_bytes)
    memory[:] = 0
    return memory


class CudaBackend:
    """Memory and streams of the current CUDA device. `copy_path` forces one rung of the ladder, for tests."""

    name = "cuda"
    pinned = True

    def __init__(self, copy_path: str | None = None) -> None:
        if copy_path is not None and copy_path not in COPY_PATHS:
            raise ConfigError(f"copy_path={copy_path!r} is unknown; choose {', '.join(COPY_PATHS)}")
        missing = unavailable_reason()
        if missing is not None:
            raise ConfigError(f"backend='cuda': {missing}")
        self.device = torch.cuda.current_device()
        self._progress = Progress()
        self._copier = Copier(self.device, copy_path)
        self._watcher = Watcher(self.device, self._progress.notify)
        self.compute = CudaStream("compute", self._copier, None, None)
        self.promote = CudaStream("promote", self._copier, torch.cuda.Stream(self.device), self._watcher.watch)
        self.demote = CudaStream("demote", self._copier, torch.cuda.Stream(self.device), self._watcher.watch)
        self.read_io = Workers("read", READ_WORKERS, self._progress.notify)
        self.write_io = Workers("write", WRITE_WORKERS, self._progress.notify)

    @property
    def copy_path(self) -> str:
        return self._copier.path

    @property
    def on_progress(self) -> Callable[[], object] | None:
        return self._progress.callback

    @on_progress.setter
    def on_progress(self, callback: Callable[[], object] | None) -> None:
        self._progress.callback = callback

    def alloc_device(self, rows: int, row_bytes: int) -> torch.Tensor:
        memory = torch.zeros(rows, row_bytes, dtype=torch.uint8, device=f"cuda:{self.device}")
        torch.cuda.current_stream(self.device).synchronize()  # zeroed before any copy stream touches it
        return memory

    def alloc_host(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        return pinned_rows(rows, row_bytes)

    def wait_any(self, timeout_s: float) -> None:
        self._progress.wait_any(timeout_s)

    def close(self, timeout_s: float) -> None:
        self.promote.synchronize(timeout_s)
        self.demote.synchronize(timeout_s)
        self._watcher.close(timeout_s)
        self.read_io.close(timeout_s)
        self.write_io.close(timeout_s)
