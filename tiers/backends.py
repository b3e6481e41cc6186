"""Choosing a backend. CUDA is probed, never assumed, and imported only when it is there."""

from __future__ import annotations

import importlib.util
import sys

from .cpu import IO_DEPTH, CpuBackend
from .errors import ConfigError
from .streams import Backend


def get_backend(name: str = "auto", *, io_depth: int = IO_DEPTH) -> Backend:
    """The backend of that name, with io_depth requests in flight on the disk each way.

    "auto" takes CUDA where torch and CuPy both see a device. Raises ConfigError.
    """
    if name == "cpu":
        return CpuBackend(io_depth=io_depth)
    if name not in ("auto", "cuda"):
        raise ConfigError(f"backend={name!r} is unknown; choose auto, cpu or cuda")
    missing = cuda_missing(probe=name == "cuda" or "torch" in sys.modules)
    if missing is None:
        from .cuda import CudaBackend

        return CudaBackend(io_depth=io_depth)
    if name == "cuda":
        raise ConfigError(
            f"backend='cuda': {missing}; install kvtier[cuda] on a machine with an NVIDIA driver, or use 'cpu'"
        )
    return CpuBackend(io_depth=io_depth)


def cuda_missing(*, probe: bool = True) -> str | None:
    """What stands in the way of the CUDA backend, or None. Without `probe`, torch is not loaded to find out."""
    for package in ("torch", "cupy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if not probe:
        return "torch is not loaded, so nothing lives on a GPU in this process"
    from .cuda import unavailable_reason

    return unavailable_reason()
