"""Uploads: integers of the host (tables, slots, row numbers) on the device of a kernel.

A plain copy from pageable memory waits until everything queued before it on its stream has run, so one of them in a step
costs the host all its lead over the device. Here the copy is from page-locked memory, which torch keeps until it has ended.
Guards: nothing in here waits for a device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import IntArray


def to_device(values: IntArray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return integers as a tensor of that device and dtype. Host values may change once this returns, on a GPU.

    Stream: the copy is queued on the current stream; work on other streams needs an event.
    """
    if isinstance(values, Tensor) and values.device == device:
        return values.to(dtype)
    host = torch.as_tensor(values if isinstance(values, Tensor) else np.ascontiguousarray(values)).to(dtype)
    if device.type == "cuda" and host.device.type == "cpu" and host.numel():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
