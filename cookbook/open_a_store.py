"""Open a kvtier store with stock zarr-python: list its parked sessions and its blocks, and plot one block.

Needs zarr alone, and matplotlib for the picture; kvtier itself is not imported, but has to be installed for arrays stored
under its codec `split`. A live store may be looked at: what is shown is as of its last commit, and a slot that is being
written anew fails its crc32c instead of reading as something else.

    python cookbook/open_a_store.py STORE [block.png] [--array g0] [--slot N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zarr

EMPTY = np.uint64(2**64 - 1)  # of a slot that holds nothing, in a shard's index
SHOWN_SLOTS = 12


def sessions_of(store: Path) -> list[dict[str, Any]]:
    """Parked sessions, as kvtier copies them into the attributes of a group; none where none was ever parked."""
    if not (store / "sessions.zarr").is_dir():
        return []
    return list(zarr.open_group(str(store / "sessions.zarr"), mode="r").attrs["kvtier"]["sessions"])


def slots_with_blocks(folder: Path, array: zarr.Array) -> list[int]:
    """Slots that hold a block, from the index at the start of every shard: offset and length of each inner chunk.

    Reading every slot would tell too, as empty ones read as zeros, but that reads the whole store.
    """
    per_shard, found = array.shards[0], []
    for shard in range(array.shape[0] // per_shard):
        file = folder / array.metadata.encode_chunk_key((shard, *[0] * (array.ndim - 1)))
        if file.exists():
            index = np.fromfile(file, "<u8", count=2 * per_shard).reshape(per_shard, 2)
            found += (shard * per_shard + np.flatnonzero(index[:, 0] != EMPTY)).tolist()
    return found


def as_float(block: np.ndarray, dtype: str) -> np.ndarray:
    """bf16 lies in the store as uint16, because zarr-python has no bfloat16: its bits are the upper half of a float32."""
    if dtype == "bfloat16":
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32)


def plot_block(block: np.ndarray, title: str, picture: str) -> str | None:
    """Keys and values of the block as one picture. Says why when there is none."""
    try:
        import matplotlib
    except ImportError:
        return f"no picture: {picture} needs matplotlib (pip install matplotlib); the listing above does not"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    plot.imshow(block.reshape(-1, block.shape[-1]), aspect="auto", cmap="coolwarm")
    plot.title(title)
    plot.savefig(picture)
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look into a kvtier store with nothing but zarr-python.")
    parser.add_argument("store", type=Path)
    parser.add_argument("picture", nargs="?", help="where to plot a block, e.g. block.png")
    parser.add_argument("--array", default="g0", help="whose block (default g0)")
    parser.add_argument("--slot", type=int, help="which block (default: the first that is there)")
    arguments = parser.parse_args(argv)
    store = arguments.store
    if not (store / "blocks.zarr").is_dir():
        print(f"{store} holds no blocks.zarr: not a kvtier store", file=sys.stderr)
        return 2

    group = zarr.open_group(str(store / "blocks.zarr"), mode="r")
    facts = group.attrs["kvtier"]
    print(f"model {facts['model_fingerprint'][:16] or '(not named)'}, store format {facts['format']}")
    sessions = sessions_of(store)
    print(f"{len(sessions)} parked sessions")
    for session in sessions:
        blocks = ", ".join(f"{n} in {name}" for name, n in session.get("blocks", {}).items()) or "?"
        tokens, when = session.get("tokens", "?"), session.get("stored_at", "?")
        print(f"  {session['id']!r}: {tokens} tokens, blocks {blocks}, parked at {when}")

    arrays = dict(sorted(group.arrays()))
    listed = {name: slots_with_blocks(store / "blocks.zarr" / name, array) for name, array in arrays.items()}
    for name, array in arrays.items():
        layout, slots = array.attrs["kvtier"]["layout"], listed[name]
        shape = f"{layout['num_layers']} layers, {layout['block_size']} tokens per block, {layout['dtype']}"
        more = f" and {len(slots) - SHOWN_SLOTS} more" if len(slots) > SHOWN_SLOTS else ""
        print(f"{name}: {len(slots)} blocks of {shape}; slots {', '.join(map(str, slots[:SHOWN_SLOTS]))}{more}")

    if arguments.array not in arrays:
        print(f"no array {arguments.array!r}; there are {', '.join(arrays)}", file=sys.stderr)
        return 2
    array, slots = arrays[arguments.array], listed[arguments.array]
    slot = arguments.slot if arguments.slot is not None else next(iter(slots), None)
    if slot not in slots:
        print(f"{arguments.array} holds no block" + (f" in slot {slot}" if slot is not None else " yet"))
        return 0 if arguments.slot is None else 2
    block = as_float(np.asarray(array[slot]), array.attrs["kvtier"]["dtype"])
    title = f"{arguments.array}, slot {slot}"
    print(f"{title}: shape {block.shape}, |K, V| up to {np.abs(block).max():.3g}")
    if arguments.picture and (problem := plot_block(block, title, arguments.picture)):
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
