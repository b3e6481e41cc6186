"""Batched copies of the CUDA driver: thousands of copies in one call, found at run time and called with plain arrays.

The driver is asked for the call as it was in CUDA 12.8, whose nine arguments later drivers keep. Guards the stream:
sources are read in stream order, so a copy never overtakes the kernel that wrote its source.
"""

from __future__ import annotations

import ctypes

from .copy_plan import Descriptors

MAX_DESCRIPTORS = 4096  # a driver was seen to crash at 51,828 in one call (vLLM issue 49276)
LEGACY_STREAMS = frozenset({0, 1})  # handles of the legacy default stream, which batches refuse
_API_VERSION = 12080
_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class DriverError(RuntimeError):
    """The driver lacks a call or refused it."""


class _Location(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


class CopyAttributes(ctypes.Structure):
    """The driver's CUmemcpyAttributes. Location hints are for managed memory only and stay empty."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class MemcpyBatch:
    """The driver's batched copy. Raises DriverError at construction where there is no driver, or one before 12.8."""

    def __init__(self) -> None:
        self._call = _PROTOTYPE(_address_of(load_driver(), b"cuMemcpyBatchAsync"))
        self._attributes = CopyAttributes(source_order=_STREAM_ORDER)
        self._first = ctypes.c_size_t(0)  # these attributes hold from copy 0 on

    def submit(self, copies: Descriptors, stream: int) -> None:
        """Queue all copies on a stream, in calls of at most MAX_DESCRIPTORS; among themselves they have no order.

        Stream: the handle must not be the legacy default stream; the calling thread has its context current.
        Raises: DriverError; copies of earlier calls may be under way then.
        """
        if stream in LEGACY_STREAMS:
            raise DriverError("batched copies do not run on the legacy default stream")
        for part in copies.parts(MAX_DESCRIPTORS):
            failed_at = ctypes.c_size_t(0)
            code = self._call(
                part.targets.ctypes.data,
                part.sources.ctypes.data,
                part.sizes.ctypes.data,
                len(part),
                ctypes.byref(self._attributes),
                ctypes.byref(self._first),
                1,
                ctypes.byref(failed_at),
                stream,
            )
            if code != 0:
                raise DriverError(f"batched copy of {len(part)}: driver error {code}, at copy {failed_at.value}")


def driver_version() -> int:
    """The newest CUDA that the installed driver supports, as 1000 * major + 10 * minor; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        code = load_driver().cuDriverGetVersion(ctypes.byref(version))
    except DriverError:
        return 0
    return version.value if code == 0 else 0


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def driver_too_old_for(built_for: str, what: str) -> str | None:
    """Why the driver cannot run something built for that CUDA version, or None. Within a major version it can."""
    has = driver_version()
    if has // 1000 >= int(built_for.split(".")[0]):
        return None
    return f"the NVIDIA driver is too old: it supports CUDA {dotted(has)}, {what} is built for {built_for}"


_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.POINTER(CopyAttributes),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_void_p,
)


def load_driver() -> ctypes.CDLL:
    """The driver's library. Raises DriverError."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no NVIDIA driver library: {error}") from error


def _address_of(driver: ctypes.CDLL, name: bytes) -> int:
    found, status = ctypes.c_void_p(), ctypes.c_int(0)
    try:
        look_up = driver.cuGetProcAddress_v2
    except AttributeError as error:
        raise DriverError("the NVIDIA driver is older than CUDA 12.0") from error
    look_up.argtypes = (
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_int),
    )
    code = look_up(name, ctypes.byref(found), _API_VERSION, 0, ctypes.byref(status))
    if code != 0 or not found.value:
        raise DriverError(
            f"the NVIDIA driver has no {name.decode()}: it supports CUDA {dotted(driver_version())}, 12.8 is needed"
        )
    return found.value
