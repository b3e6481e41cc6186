"""A real pager in a process of its own, told what to do line by line: each line is Python that runs beside `pager`.

Run as a script: argv[1] is the PagerConfig as JSON. After each line it prints one line of JSON: what `result` is then.
"""

from __future__ import annotations

import json
import sys
import traceback

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span
from kvtier.tiers.errors import KvTierError

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", name="full")


def compute(pager: Pager, tokens: list[int], namespace: str = "default", chunk: int = 64) -> int:
    """A sequence of these tokens, computed as an engine would: adopt what is cached, lease, commit."""
    seq = pager.begin(namespace)
    pager.attach(seq, tokens[:-1])
    pager.append(seq, tokens[pager.num_computed(seq) :])
    while (done := pager.num_computed(seq)) < len(tokens):
        with pager.lease([Span(seq, done, min(done + chunk, len(tokens)))]) as lease:
            lease.commit()
    return seq


def main() -> None:
    with Pager.open(LAYOUT, PagerConfig(backend="cpu", **json.loads(sys.argv[1]))) as pager:
        names = {"pager": pager, "core": pager._core, "compute": lambda *a, **k: compute(pager, *a, **k)}
        names |= {"Span": Span, "KvTierError": KvTierError, "result": None}
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            names["result"] = None
            try:
                exec(json.loads(line), names)
                print(json.dumps(names["result"]), flush=True)
            except Exception:
                print(json.dumps({"error": traceback.format_exc()}), flush=True)


if __name__ == "__main__":
    main()
