"""SGLang's prefix trees, asked for one case at a time: a program for an interpreter that has sglang installed.

    PYTHON sglang_peer.py DIRECTORY --tokens N --block-size N

One JSON object per line: a greeting on start, then an answer per request: `{"case": NAME, "setting": NAME}` gives
`{"seconds": ...}`; an answer with `error` says what failed. `kvtier bench metadata --sglang PYTHON` runs it. It imports
nothing of kvtier and replaces nothing of SGLang but torchvision, where that is not installed: its server imports it, its
trees do not use it.

Timed is RadixKey and match_prefix of a prompt, as an array of token ids, which is what SGLang's scheduler gets. A tree
compares tokens, so but for `turn` and `missing` all cases are one. Settings: the tree and how the prompt came in, in one piece
(one node) or in turns (a node each).
"""

from __future__ import annotations

import argparse
import gc
import importlib.machinery
import importlib.util
import json
import os
import random
import sys
import time
import types
from array import array
from typing import Any, TextIO
from unittest.mock import MagicMock

TURN_TOKENS = 1024


class Allocator:
    """Stands where SGLang keeps free pages: a look-up asks it for nothing, an insert gives back what the tree had."""

    device = "cpu"

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size

    def free(self, pages: Any) -> None:
        pass

    def free_segment(self, pages: Any, start_pos: int = 0, **_: Any) -> None:
        pass


class Peer:
    """A tree per setting, filled with one prompt and another one beside it."""

    def __init__(self, tokens: int, block_size: int) -> None:
        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        def params(**more: Any) -> Any:
            return CacheInitParams(False, None, Allocator(block_size), block_size, **more)

        def fill(tree: Any, step: int) -> Any:
            for prompt in (_tokens(1, tokens), self._prompt):
                for end in range(step, tokens + step, step):
                    part = prompt[: min(end, tokens)]
                    tree.insert(InsertParams(key=RadixKey(part), value=torch.arange(len(part))))
            return tree

        def unified() -> Any:
            return UnifiedRadixCache(params(tree_components=(ComponentType.FULL,)))

        self._prompt, self._other, self._turn = _tokens(0, tokens), _tokens(2, tokens), 0
        self._key, self._params = RadixKey, MatchPrefixParams
        turns = f"turns of {TURN_TOKENS} tokens"
        core = unified()
        default = f"UnifiedRadixCache with its {core._tree_core_backend} core"
        self.trees = {
            "RadixCache, one node": fill(RadixCache(params()), tokens),
            f"RadixCache, {turns}": fill(RadixCache(params()), TURN_TOKENS),
            f"{default}, one node": fill(core, tokens),
            f"{default}, {turns}": fill(unified(), TURN_TOKENS),
        }
        gc.collect()
        gc.freeze()  # as vLLM's engine does; ours does without

    def seconds(self, case: str, setting: str) -> float:
        prompt, tree = (self._other if case == "missing" else self._prompt), self.trees[setting]
        if case == "turn":
            self._turn += 1
            prompt = prompt + _tokens(2 + self._turn, TURN_TOKENS)
        start_s = time.perf_counter()
        found = tree.match_prefix(self._params(key=self._key(prompt)))
        spent_s = time.perf_counter() - start_s
        want = 0 if case == "missing" else len(self._prompt)
        if found.device_prefix_len != want:
            raise RuntimeError(f"SGLang found {found.device_prefix_len} tokens, not {want}")
        return spent_s


class _Torchvision:
    """Finds torchvision where there is none: modules whose names all stand for nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        is_ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Nothing(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def _tokens(seed: int, count: int) -> array[int]:
    return array("q", random.Random(seed).choices(range(1 << 17), k=count))


def _serve(out: TextIO, tokens: int, block_size: int) -> None:
    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        from importlib.metadata import version

        found = version("sglang")  # says at once that it is not there
        has_torchvision = importlib.util.find_spec("torchvision") is not None
        if not has_torchvision:
            sys.meta_path.append(_Torchvision())
        peer = Peer(tokens, block_size)
        note = "" if has_torchvision else "; torchvision stubbed"
        say({"version": found, "settings": list(peer.trees), "note": note})
    except Exception as error:  # no sglang, another version of it: the caller says so
        say({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        try:
            say({"seconds": peer.seconds(**json.loads(line))})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--block-size", type=int, required=True)
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints is no answer
    _serve(out, arguments.tokens, arguments.block_size)


if __name__ == "__main__":
    main()
