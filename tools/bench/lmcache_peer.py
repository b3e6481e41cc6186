"""LMCache's LocalDiskBackend, asked for one case at a time: a program for an interpreter that has lmcache installed.

    PYTHON lmcache_peer.py DIRECTORY --blocks N

One JSON object per line: a greeting on start, then an answer per request: `{"case": "write" | "committed" | "read",
"setting": NAME}` gives `{"gb_s": ...}`, `{"case": "damage"}` what was seen; an answer with `error` says what failed.
`kvtier bench nvme --lmcache PYTHON` runs it. It imports nothing of kvtier and replaces nothing of LMCache.

write: all blocks put, until LMCache's completion callback came for each. Buffered, the bytes then lie in the page cache.
committed: the same and our fdatasync of each file, as LMCache never syncs. read: all blocks with one batched get, after
fdatasync and POSIX_FADV_DONTNEED; refused while mincore sees a page of them in memory. All bytes are compared, unclocked.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

# name: O_DIRECT?, disk_io_threads. 4 is LMCache's default; 2, 6 and 8 threads and batches of 8 to 32 were no faster
SETTINGS = {
    "buffered, 4 threads": (False, 4),
    "buffered, 16 threads": (False, 16),
    "O_DIRECT, 4 threads": (True, 4),
    "O_DIRECT, 16 threads": (True, 16),
}
LAYERS, HEADS, DIM, TOKENS = 16, 8, 128, 32  # 2 MiB of bfloat16, as in `bench nvme`
BLOCK_BYTES = 2 * LAYERS * TOKENS * HEADS * DIM * 2
ROWS = 8  # source buffers, as in `bench nvme`
TIMEOUT_S = 120.0
OLD, FLIPPED = 0xA5, 1_000_003  # what a buffer held before; the byte that is flipped


class Peer:
    """One memory pool and, for each setting, one LocalDiskBackend in a folder of its own."""

    def __init__(self, folder: Path, blocks: int) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        self._torch, self._layout = torch, MemoryFormat.KV_2LTD
        self._shape = torch.Size([2, LAYERS, TOKENS, HEADS * DIM])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, (LAYERS, 2, TOKENS, HEADS, DIM))

        def config(name: str, is_direct: bool, threads: int) -> Any:
            return LMCacheEngineConfig.from_defaults(
                chunk_size=TOKENS,
                local_cpu=False,  # no copy stays in memory
                max_local_cpu_size=(blocks + 2 * ROWS) * BLOCK_BYTES / 2**30 + 0.0625,
                local_disk=str(folder / name.replace(", ", "-").replace(" ", "-")),
                max_local_disk_size=float(2**20),  # removing a key gives none of its room back (0.5.6): never full
                extra_config={"use_odirect": is_direct, "disk_io_threads": threads},
            )

        configs = {name: config(name, *how) for name, how in SETTINGS.items()}
        self._memory = LocalCPUBackend(next(iter(configs.values())), metadata, "cpu")
        self._disks = {
            name: LocalDiskBackend(one, self._loop, self._memory, "cpu", None, metadata)
            for name, one in configs.items()
        }
        for name, disk in self._disks.items():
            assert disk.use_odirect == SETTINGS[name][0] and BLOCK_BYTES % disk.os_disk_bs == 0
        self._keys = [CacheEngineKey("bench", 1, 0, 0x1000 + i, torch.bfloat16) for i in range(blocks)]
        random = torch.Generator().manual_seed(0)
        rows = self._buffers(ROWS)
        for row in rows:
            row.tensor.view(torch.int16).random_(-(2**15), 2**15, generator=random)
            assert row.get_size() == BLOCK_BYTES and row.data_ptr % mmap.PAGESIZE == 0
        self._sources = [rows[i % ROWS] for i in range(blocks)]

    def write(self, setting: str, *, is_committed: bool) -> float:
        """GB/s. LMCache skips what it has, so that is removed first, unclocked."""
        disk, left, is_done, lock = self._disks[setting], len(self._keys), threading.Event(), threading.Lock()
        for key in self._keys:
            disk.remove(key)

        def completed(_: Any) -> None:
            nonlocal left
            with lock:
                left -= 1
                if not left:
                    is_done.set()

        start_s = time.perf_counter()
        disk.batched_submit_put_task(self._keys, self._sources, on_complete_callback=completed)
        if not is_done.wait(TIMEOUT_S):
            raise RuntimeError(f"{left} puts did not complete in {TIMEOUT_S:g} s")
        if is_committed:
            self._each_file(disk, os.fdatasync)
        spent_s = time.perf_counter() - start_s
        self._each_file(disk, os.fdatasync)
        assert all(path.stat().st_size == BLOCK_BYTES for path in self._files(disk))
        return len(self._keys) * BLOCK_BYTES / spent_s / 1e9

    def read(self, setting: str) -> float:
        """GB/s, cold."""
        disk = self._disks[setting]
        self._make_cold(disk)
        start_s = time.perf_counter()
        got = disk.batched_get_blocking(self._keys)
        spent_s = time.perf_counter() - start_s
        for have, want in zip(got, self._sources):
            if have is None or not self._torch.equal(self._bits(have), self._bits(want)):
                raise RuntimeError("LMCache returned other bytes than were put")
            have.tensor.zero_()  # the next read has to bring them again
            have.ref_count_down()
        return len(self._keys) * BLOCK_BYTES / spent_s / 1e9

    def damage(self) -> list[dict[str, Any]]:
        """What gets of damaged files return, file by file: buffered and O_DIRECT, the block alone and with another one."""
        found = []
        for setting in ("buffered, 4 threads", "O_DIRECT, 4 threads"):
            disk = self._disks[setting]
            for kind, spoil in (("truncated to half", _truncate), ("one byte flipped", _flip)):
                self.write(setting, is_committed=True)
                spoil(self._files(disk)[0])
                for keys in (self._keys[:1], self._keys[:2]):
                    self._make_cold(disk)
                    held = self._buffers(2)
                    for one in held:  # so that bytes that no read brought can be told
                        one.tensor.view(self._torch.uint8).fill_(OLD)
                    for one in held:
                        one.ref_count_down()
                    found.append({"setting": setting, "damage": kind, "keys": len(keys), **self._outcome(disk, keys)})
        return found

    def close(self) -> None:
        for disk in self._disks.values():
            disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _outcome(self, disk: Any, keys: list[Any]) -> dict[str, Any]:
        try:
            got = disk.batched_get_blocking(keys)
        except Exception as error:  # whatever LMCache does is what we report
            return {"outcome": f"raised {type(error).__name__}", "wrong_bytes": 0, "tail": ""}
        if got[0] is None:
            outcome: dict[str, Any] = {"outcome": "miss", "wrong_bytes": 0, "tail": ""}
        else:
            have, want = (self._bits(one).view(self._torch.uint8).flatten() for one in (got[0], self._sources[0]))
            tail = have[BLOCK_BYTES // 2 :]
            seen = {"right": tail.equal(want[BLOCK_BYTES // 2 :]), "zeros": not tail.any(), "old": (tail == OLD).all()}
            names = [name for name, is_so in seen.items() if is_so]
            wrong = int((have != want).sum())
            outcome = {"outcome": "hit", "wrong_bytes": wrong, "tail": names[0] if names else "other"}
        for one in got:
            if one is not None:
                one.ref_count_down()
        return outcome

    def _buffers(self, n: int) -> list[Any]:
        return [self._memory.allocate(self._shape, self._torch.bfloat16, self._layout) for _ in range(n)]

    def _bits(self, held: Any) -> Any:
        return held.tensor.view(self._torch.int16)

    def _files(self, disk: Any) -> list[Path]:
        return [Path(disk.dict[key].path) for key in self._keys]

    def _each_file(self, disk: Any, call: Callable[[int], object]) -> None:
        for path in self._files(disk):
            fd = os.open(path, os.O_RDWR)
            try:
                call(fd)
            finally:
                os.close(fd)

    def _make_cold(self, disk: Any) -> None:
        for _ in range(10):  # pages that somebody else just looked at stay for one more try
            self._each_file(disk, os.fdatasync)
            self._each_file(disk, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))
            pages = sum(map(_pages_in_memory, self._files(disk)))
            if not pages:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{pages} pages stay in the page cache: this read would not be cold")


def _truncate(path: Path) -> None:
    os.truncate(path, BLOCK_BYTES // 2)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(FLIPPED)
        byte = file.read(1)[0]
        file.seek(FLIPPED)
        file.write(bytes([byte ^ 1]))


def _pages_in_memory(path: Path) -> int:
    """Pages of the file in the page cache, as mincore says."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    size, fd = path.stat().st_size, os.open(path, os.O_RDONLY)
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    has_failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    if has_failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages)


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    case = request["case"]
    if case == "damage":
        return {"damage": peer.damage()}
    if case == "read":
        return {"gb_s": peer.read(request["setting"])}
    return {"gb_s": peer.write(request["setting"], is_committed=case == "committed")}


def _serve(out: TextIO, folder: Path, blocks: int) -> None:
    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        from importlib.metadata import version

        peer = Peer(folder, blocks)
        say({"lmcache": version("lmcache"), "settings": list(SETTINGS), "block_bytes": BLOCK_BYTES})
    except Exception as error:  # no lmcache, another version of it, no memory: the caller says so
        say({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        try:
            say(_answer(peer, json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
    peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=256)
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever LMCache prints is no answer
    os.environ["LMCACHE_TRACK_USAGE"] = "false"  # before the import: no usage reports
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    _serve(out, arguments.directory, arguments.blocks)


if __name__ == "__main__":
    main()
