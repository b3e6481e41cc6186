"""One client of `kvtier bench daemon`: looks a prompt's keys up again and again, prints the seconds of each as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
import time

from kvtier import KVLayout

from ...pager.client.attachment import Attachment
from ...pager.client.connection import Greeting

LOOKUP_LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")  # 1 KiB blocks
MODEL = "bench"


def keys_of(count: int) -> list[bytes]:
    return [hashlib.blake2b(i.to_bytes(8, "little"), digest_size=32).digest() for i in range(count)]


def main(address: str, count: int, start_s: float, seconds: float) -> None:
    client = Attachment.open(address, [LOOKUP_LAYOUT], MODEL, {}, Greeting("bench"))
    keys, spent = keys_of(count), []
    while time.time() < start_s:
        time.sleep(0.001)
    until_s = time.time() + seconds
    while time.time() < until_s:
        began_s = time.perf_counter()
        found = client.lookup(keys, prefix=True, hold=False)
        spent.append(time.perf_counter() - began_s)
        assert found.shape == (1, count), f"{found.shape} where {count} keys are held"
    client.goodbye()
    print(json.dumps(spent))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
