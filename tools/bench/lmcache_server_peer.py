"""LMCache's own server (`python -m lmcache.v1.server`), asked for one case at a time: a program for LMCache's interpreter.

    PYTHON lmcache_server_peer.py DIRECTORY --blocks N --keys N

One JSON object per line: a greeting on start, then an answer per request: `{"case": "put" | "get" | "lookup"}`
gives `{"seconds": ...}`; an answer with `error` says what failed. Client and server are LMCache's own (its connector, its
TCP protocol); it imports nothing of kvtier. put: every block, then one EXIST, because a PUT has no answer. get: every
block; all bytes are compared, unclocked. lookup: one EXIST per key, as its protocol has no batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

LAYERS, HEADS, DIM, TOKENS = 16, 8, 128, 32  # 2 MiB of bfloat16, as in `bench nvme`
BLOCK_BYTES = 2 * LAYERS * TOKENS * HEADS * DIM * 2
ROWS = 8  # source buffers
START_S = 60.0


class Server:
    """The server in a process of its own, on a free port of loopback."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(self.port), "cpu"]
        self._process = subprocess.Popen(command, stdout=sys.stderr)
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError("lmcache.v1.server did not start") from None
                time.sleep(0.1)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Peer:
    """LMCache's connector on one side, its server on the other."""

    def __init__(self, server: Server, blocks: int, keys: int) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

        self._torch, self._loop = torch, asyncio.new_event_loop()
        metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, (LAYERS, 2, TOKENS, HEADS, DIM))
        size_gb = (blocks + 2 * ROWS) * BLOCK_BYTES / 2**30 + 0.0625
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=TOKENS, local_cpu=False, max_local_cpu_size=size_gb, remote_url=f"lm://127.0.0.1:{server.port}"
        )
        memory = LocalCPUBackend(config, metadata, "cpu")
        self._server = LMCServerConnector("127.0.0.1", server.port, self._loop, memory)
        self._blocks = [CacheEngineKey("bench", 1, 0, 0x1000 + i, torch.bfloat16) for i in range(blocks)]
        self._keys = [CacheEngineKey("bench", 1, 0, 0x1000000 + i, torch.bfloat16) for i in range(keys)]
        shape, random = torch.Size([2, LAYERS, TOKENS, HEADS * DIM]), torch.Generator().manual_seed(0)
        rows = [memory.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD) for _ in range(ROWS)]
        for row in rows:
            row.tensor.view(torch.int16).random_(-(2**15), 2**15, generator=random)
            assert row.get_size() == BLOCK_BYTES
        self._sources = [rows[i % ROWS] for i in range(blocks)]

    def put(self) -> float:
        return self._timed(self._put)

    def get(self) -> float:
        found: list[Any] = []
        spent_s = self._timed(lambda: self._get(found))
        for have, want in zip(found, self._sources):
            if have is None or not self._torch.equal(self._bits(have), self._bits(want)):
                raise RuntimeError("LMCache's server returned other bytes than were put, or none")
            have.ref_count_down()
        return spent_s

    def _bits(self, block: Any) -> Any:
        return block.tensor.view(self._torch.int16)

    def lookup(self) -> float:
        return self._timed(self._lookup)

    def _timed(self, work: Callable[[], Any]) -> float:
        start_s = time.perf_counter()
        self._loop.run_until_complete(work())
        return time.perf_counter() - start_s

    async def _put(self) -> None:
        for key, row in zip(self._blocks, self._sources):
            await self._server.put(key, row)
        assert await self._server.exists(self._blocks[-1])

    async def _get(self, found: list[Any]) -> None:
        for key in self._blocks:
            found.append(await self._server.get(key))

    async def _lookup(self) -> None:
        for key in self._keys:
            await self._server.exists(key)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--keys", type=int, required=True)
    arguments = parser.parse_args()
    replies, sys.stdout = sys.stdout, sys.stderr  # LMCache prints where it likes
    try:
        from importlib.metadata import version

        server = Server()
    except Exception as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    try:
        peer = Peer(server, arguments.blocks, arguments.keys)
        greeting = {"lmcache": version("lmcache"), "block_bytes": BLOCK_BYTES}
        print(json.dumps(greeting), file=replies, flush=True)
        for line in sys.stdin:
            case = json.loads(line)["case"]
            seconds = {"put": peer.put, "get": peer.get, "lookup": peer.lookup}[case]()
            print(json.dumps({"seconds": seconds}), file=replies, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main()
