"""Mends the interpreter of triton 3.6, which takes int() of a one-element array; numpy 2.4 refuses that."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    """Do what triton does, then turn values into numbers the way later versions do."""
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())


interpreter._patch_lang_tensor = patch_lang_tensor
