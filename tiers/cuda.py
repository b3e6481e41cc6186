"""CUDA backend: torch's streams and events, exact pinned slabs from CuPy, copies by the copy engines.

The only module that names `torch.cuda` or CuPy; it is loaded once both are known to be installed. Guards the order of
copies: each is queued on a stream of its own and done when the event recorded behind it says so. Completions are found
by one thread that asks; the driver never calls Python, because such a callback waits for the GIL while it holds the driver.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .completions import Completions, Pending, PolledEvent, unavailable
from .copy_paths import PROBE_ROW_BYTES, PROBE_ROWS, copy_by_calls, copy_by_tensors, copy_on_host, is_exact
from .copy_plan import CopyPlan, plan_copy, row_space
from .cpu import IO_DEPTH
from .errors import ConfigError, TierUnavailableError
from .machine import Machine
from .memcpy_batch import LEGACY_STREAMS, MemcpyBatch, dotted, driver_too_old_for, driver_version
from .staged import StagedWorkers
from .streams import Event, IntArray, Progress, Rows, Verdict, Work

CopyPath = Literal["batch", "runs", "torch"]
COPY_PATHS: tuple[CopyPath, ...] = ("batch", "runs", "torch")  # best first
_PAGE_BYTES = 4096
_BY_ADDRESS = 4  # cudaMemcpyDefault: the direction follows from the addresses
_PORTABLE = 1  # cudaHostAllocPortable: page-locked for every device


def unavailable_reason() -> str | None:
    """What stands in the way of this backend, or None. Starts CUDA where there is a device; never raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about what is returned here
        is_seen = torch.cuda.is_available()
    if not is_seen:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        too_old = driver_too_old_for(torch.version.cuda, "torch") if driver_version() else None
        return too_old or f"torch {torch.__version__} sees no CUDA device"
    try:
        import cupy
    except (ImportError, OSError) as error:
        return f"CuPy cannot be imported: {' '.join(str(error).split()) or repr(error)}"
    too_old = driver_too_old_for(dotted(int(cupy.cuda.runtime.runtimeGetVersion())), "CuPy")
    if too_old or cupy.is_available():
        return too_old
    return f"CuPy {cupy.__version__} sees no CUDA device"


class CopyEngine:
    """Queues a planned copy on a stream, by one of three paths; the best that works here is found once, at start.

    batch: one driver call for thousands of descriptors. runs: one `memcpyAsync` per run of neighbours. torch: `copy_`.
    """

    def __init__(self, device: torch.device, path: CopyPath | None) -> None:
        import cupy

        self._device, self._runtime = device, cupy.cuda.runtime
        self._batch: MemcpyBatch | None = None
        self._bound = threading.local()
        refusals = []
        for self.path in COPY_PATHS if path is None else (path,):
            if (reason := self._refusal()) is None:
                return
            refusals.append(f"copy_path={self.path!r}: {reason}")
        raise ConfigError("no way to copy rows on this machine: " + "; ".join(refusals))

    def copy(self, stream: torch.cuda.Stream, plan: CopyPlan, target: Rows, source: Rows) -> None:
        """Raises RuntimeError (of the driver, CuPy or torch) when a copy cannot be queued; some may be queued then."""
        if not len(plan.lengths) or not plan.target.row_bytes:
            return
        handle = stream.cuda_stream
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            if not plan.target.is_device and not plan.source.is_device:
                stream.synchronize()  # no engine moves host to host; nothing of ours does so while serving
                copy_on_host(plan, target, source)
            elif self.path == "torch" or handle in LEGACY_STREAMS:
                copy_by_tensors(plan, target, source)
            elif self.path == "batch" and self._batch is not None:
                self._bind_context()
                self._batch.submit(plan.descriptors(), handle)
            else:
                copy_by_calls(plan, self._runtime.memcpyAsync, self._runtime.memcpy2DAsync, _BY_ADDRESS, handle)

    def _bind_context(self) -> None:
        """The driver call needs a context current in this thread; choosing the device through torch binds none."""
        if not getattr(self._bound, "is_done", False):
            self._runtime.setDevice(self._device.index)
            self._runtime.free(0)  # any call of the runtime that needs a context binds it
            self._bound.is_done = True

    def _refusal(self) -> str | None:
        """Why this path does not work here, found by copying a few rows to the device and back with it."""
        try:
            if self.path == "batch":
                self._batch = MemcpyBatch()
            stream = torch.cuda.Stream(self._device)
            source, back = (pinned_rows(PROBE_ROWS, PROBE_ROW_BYTES, self._device) for _ in range(2))
            device = torch.zeros((PROBE_ROWS, PROBE_ROW_BYTES), dtype=torch.uint8, device=self._device)
            torch.cuda.current_stream(self._device).synchronize()
            copy = partial(self.copy, stream)
            return None if is_exact(copy, source, device, back, stream.synchronize) else "copied bytes are wrong"
        except RuntimeError as error:
            return str(error)


def pinned_rows(rows: int, row_bytes: int, device: torch.device) -> npt.NDArray[np.uint8]:
    """Zeroed, page-locked, page-aligned host rows of exactly that size, from no pool. Raises ConfigError for too many."""
    import cupy

    size = rows * row_bytes
    if size == 0:
        return np.empty((rows, row_bytes), np.uint8)
    try:
        with torch.cuda.device(device):
            memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size, _PORTABLE), 0)
            if memory.ptr % _PAGE_BYTES:  # the driver hands out small pieces at finer steps
                larger = cupy.cuda.PinnedMemory(size + _PAGE_BYTES - 1, _PORTABLE)
                memory = cupy.cuda.PinnedMemoryPointer(larger, -larger.ptr % _PAGE_BYTES)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ConfigError(f"host_bytes: {size} bytes cannot be page-locked ({error}); lower host_bytes") from error
    slab = np.frombuffer(memory, np.uint8, size).reshape(rows, row_bytes)
    slab[:] = 0
    return slab


class _Stream:
    """What both kinds of stream do the same way."""

    name: str
    _stream: Any

    def wait(self, event: Event) -> None:
        """On the device for an event of the device; the host waits for work of the host (disk)."""
        if event.is_done():
            return
        if isinstance(event, PolledEvent):
            self._stream.wait_event(event.native)
        else:
            event.wait()

    def synchronize(self, timeout_s: float | None = None) -> bool:
        return _recorded(self._stream).wait(timeout_s)


class CopyStream(_Stream):
    """A stream of its own for copies in one direction. A copy that fails marks the event recorded after it."""

    def __init__(self, name: str, device: torch.device, engine: CopyEngine, completions: Completions) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(device)
        self._engine, self._completions = engine, completions
        self._pending = Pending()
        self._is_closed = False
        completions.add_stream(name)

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        """Host rows must come from `alloc_host`. Raises ValueError for rows that do not fit, before anything is queued."""
        if self._is_closed:
            raise TierUnavailableError(f"stream {self.name!r} is closed")
        plan = plan_copy(row_space(target), target_rows, row_space(source), source_rows)
        self._pending.keeps += (target, source)
        try:
            self._engine.copy(self._stream, plan, target, source)
        except RuntimeError as error:
            if self._pending.error is None:
                self._pending.error = unavailable(f"stream {self.name!r}: a copy could not be queued", error)

    def run(self, fn: Work) -> None:
        """What the host's part of it raises marks the event recorded after it, as on every copy stream."""
        try:
            with torch.cuda.stream(self._stream):
                verdict = fn()
            if verdict is not None:
                self._pending.verdicts += (verdict,)
        except Exception as error:
            self._pending.error = self._pending.error or error

    def record(self) -> PolledEvent:
        pending = self._pending
        event = _recorded(self._stream, pending.error, pending.keeps, pending.verdicts)
        pending.error, pending.keeps, pending.verdicts = None, (), ()
        self._completions.watch(self.name, event)
        return event

    def close(self, timeout_s: float) -> None:
        self._is_closed = True
        self.synchronize(timeout_s)


class ComputeStream(_Stream):
    """The stream that the calling thread's kernels run on, whichever it is at the time of the call."""

    name = "compute"

    def __init__(self, device: torch.device, engine: CopyEngine) -> None:
        self._device, self._engine = device, engine

    @property
    def _stream(self) -> torch.cuda.Stream:  # type: ignore[override]
        return torch.cuda.current_stream(self._device)

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        """Raises: TierUnavailableError when the copy cannot be queued."""
        plan = plan_copy(row_space(target), target_rows, row_space(source), source_rows)
        try:
            self._engine.copy(self._stream, plan, target, source)
        except RuntimeError as error:
            raise unavailable(f"stream {self.name!r}: a copy could not be queued", error) from error

    def run(self, fn: Work) -> None:
        """Work whose verdict somebody waits for belongs on a copy stream."""
        fn()

    def record(self) -> PolledEvent:
        """Not watched: who waits for computing waits for the event."""
        return _recorded(self._stream)


def _recorded(
    stream: torch.cuda.Stream,
    error: BaseException | None = None,
    keeps: object = None,
    verdicts: tuple[Verdict, ...] = (),
) -> PolledEvent:
    native = torch.cuda.Event(blocking=True)
    event = PolledEvent(native, error, keeps, verdicts)
    try:
        native.record(stream)
    except RuntimeError as cause:
        event.fail(cause)
    return event


class CudaBackend:
    """Memory and streams of one CUDA device. Raises ConfigError where there is none, or the copy path does not work."""

    name = "cuda"
    pinned = True
    reads_host = False

    def __init__(
        self, *, device: int | None = None, copy_path: CopyPath | None = None, io_depth: int = IO_DEPTH
    ) -> None:
        if (reason := unavailable_reason()) is not None:
            raise ConfigError(f"backend='cuda': {reason}")
        if copy_path is not None and copy_path not in COPY_PATHS:
            raise ConfigError(f"copy_path={copy_path!r} is unknown; choose {', '.join(COPY_PATHS)}")
        self.device = torch.device("cuda", torch.cuda.current_device() if device is None else device)
        self._engine = CopyEngine(self.device, copy_path)
        self._progress = Progress()
        notify = self._progress.notify
        self._completions = Completions(notify)
        self.compute = ComputeStream(self.device, self._engine)
        self.promote = CopyStream("promote", self.device, self._engine, self._completions)
        self.demote = CopyStream("demote", self.device, self._engine, self._completions)
        self.read_io = StagedWorkers("read", io_depth, notify)
        self.write_io = StagedWorkers("write", io_depth, notify)

    @property
    def copy_path(self) -> CopyPath:
        return self._engine.path

    @property
    def on_progress(self) -> Callable[[], object] | None:
        return self._progress.callback

    @on_progress.setter
    def on_progress(self, callback: Callable[[], object] | None) -> None:
        self._progress.callback = callback

    def alloc_device(self, rows: int, row_bytes: int) -> torch.Tensor:
        """Zeroed, and zeroed before any stream can see it. Raises ConfigError when the device has not that much left."""
        try:
            with torch.inference_mode(False):  # copies come from threads outside that mode
                pool = torch.zeros((rows, row_bytes), dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"device_bytes: {rows * row_bytes} bytes do not fit the device, which has "
                f"{torch.cuda.mem_get_info(self.device)[0]} free; lower device_bytes"
            ) from error
        torch.cuda.current_stream(self.device).synchronize()
        return pool

    @property
    def near_node(self) -> int | None:
        import cupy

        try:
            return Machine().node_of_pci(str(cupy.cuda.runtime.deviceGetPCIBusId(self.device.index)))
        except RuntimeError:  # a driver that does not say; host memory then lies near our CPUs
            return None

    def alloc_host(self, rows: int, row_bytes: int, *, huge_pages: str = "auto") -> npt.NDArray[np.uint8]:
        """Faulted in by the driver, in pages that it chooses: `huge_pages` has no say here."""
        return pinned_rows(rows, row_bytes, self.device)

    def pin(self, rows: Rows) -> bool:
        """Costs as long as faulting the memory in. Without it copies are right and slower."""
        import cupy

        if not rows.nbytes:
            return False
        try:
            with torch.cuda.device(self.device):
                cupy.cuda.runtime.hostRegister(rows.ctypes.data, rows.nbytes, _PORTABLE)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            warnings.warn(f"{rows.nbytes} bytes of shared memory are not page-locked: {error}", stacklevel=2)
            return False
        return True

    def unpin(self, rows: Rows) -> None:
        import cupy

        cupy.cuda.runtime.hostUnregister(rows.ctypes.data)

    def wait_any(self, timeout_s: float) -> None:
        self._progress.wait_any(timeout_s)

    def notify(self) -> None:
        self._progress.notify()

    def close(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for part in (self.promote, self.demote, self._completions, self.read_io, self.write_io):
            part.close(max(0.0, deadline_s - time.monotonic()))


def device_facts(device: int = 0) -> dict[str, Any]:
    """What a result file says about the device and its driver."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver_cuda": dotted(driver_version()),
        "torch_cuda": torch.version.cuda,
    }
