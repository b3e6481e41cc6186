"""kvtier: the front door. Public names, loaded when first used; importing this loads neither torch nor CuPy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.engine import Engine as Engine
    from .engine.hf import StreamingWindow as StreamingWindow
    from .engine.prefix_cache import PrefixCache as PrefixCache
    from .engine.sampling import Output as Output
    from .engine.sampling import SamplingParams as SamplingParams
    from .engine.session import Session as Session
    from .pager.config import PagerConfig as PagerConfig
    from .pager.pager import Pager as Pager
    from .tiers.layout import KVLayout as KVLayout

__version__ = "0.1.0"

_HOME = {
    "KVLayout": "tiers.layout",
    "PagerConfig": "pager.config",
    "Pager": "pager.pager",
    "Engine": "engine.engine",
    "PrefixCache": "engine.prefix_cache",
    "SamplingParams": "engine.sampling",
    "Output": "engine.sampling",
    "Session": "engine.session",
    "StreamingWindow": "engine.hf",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvtier' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
