"""CUDA IPC: one plain allocation that another process opens by its handle, and copies on it without torch.

The owner takes its pool with cudaMalloc itself, since memory of a caching or virtual-memory allocator has no handle of its
own. The copier (a daemon) loads CuPy for the first handle, page-locks its slab once, and copies on streams of its own.
Nothing here waits on an event of the other process: the owner's stream is finished before it asks for a copy, and the
copier answers after its own stream is. Guards: no copy reaches past what the handle names; a refusal is an error in words,
and leaves none behind in the driver.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .completions import Completions, PolledEvent, unavailable
from .copy_paths import copy_by_calls
from .copy_plan import RowSpace, plan_copy, row_space
from .errors import ConfigError
from .exported import CUDA, PROBE_ROWS, ExportedRows
from .memcpy_batch import load_driver
from .streams import Backend, IntArray, Rows

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS, _BY_ADDRESS, _PORTABLE = 1, 4, 1  # flags of the runtime: of opening, of copies, of page-locking
_WHOLE_BYTES = 2 << 20  # smaller allocations may share a piece of memory, and a handle names the whole piece
_CLOSE_S = 5.0


def export_device_rows(backend: Backend, rows: int, row_bytes: int) -> ExportedRows:
    """Raises ConfigError where the device lacks memory or gives no handle (MIG, confidential mode, some containers)."""
    import cupy
    import torch

    device = backend.device.index  # type: ignore[attr-defined]
    count = rows + PROBE_ROWS
    size = -(-count * row_bytes // _WHOLE_BYTES) * _WHOLE_BYTES
    try:
        with cupy.cuda.Device(device):
            memory = cupy.cuda.Memory(size)  # cudaMalloc, of no pool
            handle = bytes(cupy.cuda.runtime.ipcGetMemHandle(memory.ptr))
            bus = cupy.cuda.runtime.deviceGetPCIBusId(device)
            made = cupy.ndarray((count, row_bytes), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
            made.fill(0)
            cupy.cuda.Stream.null.synchronize()
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError) as error:
        _forget_error(cupy)
        raise ConfigError(f"the device gives no IPC handle for {size} bytes: {error}") from error
    pool = torch.from_dlpack(made)
    return ExportedRows(pool[:rows], pool[rows:], CUDA, handle + bus.encode(), None, owner=made)


def map_device_rows(
    handle: bytes, rows: int, row_bytes: int, slab: Rows, notify: Callable[[], None]
) -> MappedDeviceRows:
    """Raises ConfigError: no CuPy here, another GPU than the owner's, a handle that cannot be opened."""
    try:
        import cupy
    except (ImportError, OSError) as error:
        raise ConfigError(f"a pool in CUDA memory needs CuPy here: {error}; install kvtier[cuda]") from error
    bus = handle[HANDLE_BYTES:].decode("ascii", "replace")
    try:
        device = int(cupy.cuda.runtime.deviceGetByPCIBusId(bus))
        with cupy.cuda.Device(device):
            address = int(cupy.cuda.runtime.ipcOpenMemHandle(handle[:HANDLE_BYTES], _LAZY_PEER_ACCESS))
            if (has := _bytes_behind(address)) < rows * row_bytes:
                cupy.cuda.runtime.ipcCloseMemHandle(address)
                raise ConfigError(f"a pool on GPU {bus!r} has {has} bytes, {rows * row_bytes} were announced")
            return MappedDeviceRows(cupy, device, RowSpace(address, rows, row_bytes, row_bytes, True), slab, notify)
    except (RuntimeError, ValueError) as error:  # of the driver; of a bus id that is none
        _forget_error(cupy)
        raise ConfigError(f"the IPC handle of a pool on GPU {bus!r} cannot be opened here: {error}") from error


def _bytes_behind(address: int) -> int:
    """From here to the end of its allocation: what lies behind that may be another client's pool. 0 for none."""
    base, size = ctypes.c_uint64(0), ctypes.c_size_t(0)
    ask = load_driver().cuMemGetAddressRange_v2
    code = ask(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    return base.value + size.value - address if code == 0 else 0


def _forget_error(cupy: Any) -> None:
    """A refused handle stays behind as the thread's last error, and would be the next call's."""
    get_last = getattr(cupy.cuda.runtime, "getLastError", None)
    if get_last is not None:
        get_last()


class MappedDeviceRows:
    """See exported.MappedRows. `rows` is a RowSpace: only streams of this file know what to do with it."""

    def __init__(self, cupy: Any, device: int, rows: RowSpace, slab: Rows, notify: Callable[[], None]) -> None:
        self._cupy, self._device, self.rows = cupy, device, rows
        self._slab = slab
        _PINS.take(cupy, device, slab)
        self._completions = Completions(notify)
        self.promote = IpcStream("promote", cupy, device, self._completions)
        self.demote = IpcStream("demote", cupy, device, self._completions)

    def close(self) -> None:
        self._completions.close(_CLOSE_S)
        with self._cupy.cuda.Device(self._device):
            self._cupy.cuda.runtime.ipcCloseMemHandle(self.rows.address)
        _PINS.let_go(self._cupy, self._device, self._slab)


class _Pins:
    """Host memory page-locked for a device, once however many pools are mapped beside it. A refusal only costs speed."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._users: dict[tuple[int, int], int] = {}

    def take(self, cupy: Any, device: int, slab: Rows) -> None:
        place = device, slab.ctypes.data
        with self._guard:
            self._users[place] = self._users.get(place, 0) + 1
            if self._users[place] == 1:
                self._call(cupy, device, cupy.cuda.runtime.hostRegister, slab.ctypes.data, slab.nbytes, _PORTABLE)

    def let_go(self, cupy: Any, device: int, slab: Rows) -> None:
        place = device, slab.ctypes.data
        with self._guard:
            self._users[place] -= 1
            if not self._users[place]:
                del self._users[place]
                self._call(cupy, device, cupy.cuda.runtime.hostUnregister, slab.ctypes.data)

    def _call(self, cupy: Any, device: int, call: Callable[..., object], *arguments: int) -> None:
        try:
            with cupy.cuda.Device(device):
                call(*arguments)
        except cupy.cuda.runtime.CUDARuntimeError:
            _forget_error(cupy)


_PINS = _Pins()


class IpcStream:
    """A CUDA stream for copies in one direction, without torch. A copy that fails marks the event recorded after it.

    See exported.CopyStream.
    """

    def __init__(self, name: str, cupy: Any, device: int, completions: Completions) -> None:
        self.name, self._cupy, self._device, self._completions = name, cupy, device, completions
        with cupy.cuda.Device(device):
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._error: BaseException | None = None
        self._guard = threading.Lock()
        completions.add_stream(name)

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        to, of = (rows if isinstance(rows, RowSpace) else row_space(rows) for rows in (target, source))
        plan, runtime = plan_copy(to, target_rows, of, source_rows), self._cupy.cuda.runtime
        try:
            with self._guard, self._cupy.cuda.Device(self._device):
                copy_by_calls(plan, runtime.memcpyAsync, runtime.memcpy2DAsync, _BY_ADDRESS, self._stream.ptr)
        except RuntimeError as error:
            self._error = self._error or unavailable(f"stream {self.name!r}: a copy could not be queued", error)

    def record(self) -> PolledEvent:
        with self._guard, self._cupy.cuda.Device(self._device):
            native = self._cupy.cuda.Event(block=True, disable_timing=True)
            native.record(self._stream)
        error, self._error = self._error, None
        event = PolledEvent(_Asked(native), error)
        self._completions.watch(self.name, event)
        return event


class _Asked:
    """CuPy's event in the words of completions.Native."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def query(self) -> bool:
        return bool(self._native.done)

    def synchronize(self) -> None:
        self._native.synchronize()
