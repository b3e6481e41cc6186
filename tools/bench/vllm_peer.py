"""vLLM's KVCacheManager, asked for one case at a time: a program for an interpreter that has vllm installed.

    PYTHON vllm_peer.py DIRECTORY --tokens N --block-size N

One JSON object per line: a greeting on start, then an answer per request: `{"case": NAME, "setting": NAME}` gives
`{"seconds": ...}`; an answer with `error` says what failed. `kvtier bench metadata --vllm PYTHON` runs it. It imports
nothing of kvtier and replaces nothing of vLLM. Settings are hash functions of vLLM's, its default first.

first, new, array, turn, missing: a Request, which hashes its prompt, and get_computed_blocks. It keeps no hashes of earlier
requests, so the first three are one. known: get_computed_blocks of a request that has its hashes. The last block of a
prompt that is cached whole does not count, as vLLM computes it again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from typing import Any, TextIO

SETTINGS = ("sha256", "xxhash")
CHUNK_TOKENS, TURN_TOKENS = 8192, 1024


class Peer:
    """A manager per hash function, that holds one prompt and another one beside it."""

    def __init__(self, tokens: int, block_size: int) -> None:
        from vllm.config.cache import CacheConfig
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        if CacheConfig.prefix_caching_hash_algo != SETTINGS[0]:
            raise RuntimeError(f"vLLM's default hash is {CacheConfig.prefix_caching_hash_algo}, not {SETTINGS[0]}")
        self._size, self._number = block_size, 0
        self._prompt, self._other = _tokens(0, tokens), _tokens(2, tokens)
        self._request, self._sampling = Request, SamplingParams(max_tokens=16)
        self._hashers, self._managers, self._known = {}, {}, {}
        init_none_hash(get_hash_fn_by_name(SETTINGS[0]))  # one for the process
        for name in SETTINGS:
            hash_one = get_hash_fn_by_name(name)
            self._hashers[name] = get_request_block_hasher(block_size, hash_one)
            self._managers[name] = _manager(tokens, block_size)
            for prompt in (_tokens(1, tokens), self._prompt):
                self._fill(name, prompt)
            self._known[name] = self._new(name, self._prompt)
        gc.collect()
        gc.freeze()  # as vLLM's engine does

    def seconds(self, case: str, setting: str) -> float:
        prompt = self._other if case == "missing" else self._prompt
        if case == "turn":
            prompt = prompt + _tokens(3 + self._number, TURN_TOKENS)
        manager = self._managers[setting]
        start_s = time.perf_counter()
        request = self._known[setting] if case == "known" else self._new(setting, prompt)
        found = manager.get_computed_blocks(request)
        spent_s = time.perf_counter() - start_s
        whole = len(self._prompt) if case == "turn" else len(prompt) - 1
        want = 0 if case == "missing" else whole // self._size * self._size
        if found[1] != want:
            raise RuntimeError(f"vLLM found {found[1]} tokens, not {want}")
        return spent_s

    def _new(self, name: str, prompt: list[int]) -> Any:
        self._number += 1
        return self._request(str(self._number), prompt, self._sampling, None, block_hasher=self._hashers[name])

    def _fill(self, name: str, prompt: list[int]) -> None:
        manager, request = self._managers[name], self._new(name, prompt)
        while request.num_computed_tokens < len(prompt):
            count = min(CHUNK_TOKENS, len(prompt) - request.num_computed_tokens)
            if manager.allocate_slots(request, count) is None:
                raise RuntimeError("vLLM's pool is too small for two prompts")
            request.num_computed_tokens += count
        manager.free(request)


def _manager(tokens: int, block_size: int) -> Any:
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    config = KVCacheConfig(6 * (tokens // block_size), [], [KVCacheGroupSpec(["layer.0"], spec)])
    return KVCacheManager(config, tokens + 4096, scheduler_block_size=block_size, hash_block_size=block_size)


def _tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(1 << 17), k=count)


def _serve(out: TextIO, tokens: int, block_size: int) -> None:
    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        from importlib.metadata import version

        found = version("vllm")  # says at once that it is not there
        peer = Peer(tokens, block_size)
        settings = [f"KVCacheManager, {name}" for name in SETTINGS]
        say({"version": found, "settings": settings, "note": ""})
    except Exception as error:  # no vllm, another version of it: the caller says so
        say({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            say({"seconds": peer.seconds(asked["case"], asked["setting"].rpartition(" ")[2])})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--block-size", type=int, required=True)
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # before the import: no usage reports
    _serve(out, arguments.tokens, arguments.block_size)


if __name__ == "__main__":
    main()
