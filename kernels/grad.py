"""Without gradients: what every function of this package is wrapped in. Knows nothing of attention.

torch.no_grad as a decorator makes and enters a guard at each call, which a decode step would pay twice per layer; where
gradients are off already, as in an engine's step, this one calls straight through. Guards: no kernel of ours ever
records a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def without_grad(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, run without recording gradients."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
