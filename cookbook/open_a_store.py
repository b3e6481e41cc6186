"""Open a kvtier store with stock zarr-python: list sessions' and groups' facts, read blocks, plot one.

Needs zarr, and matplotlib for the picture; kvtier itself is not imported, but has to be installed for arrays stored under
its codec `split`. Use a store that nobody writes to, or blocks whose checksum zarr accepts: a slot that is being written
anew fails its crc32c.

    python cookbook/open_a_store.py STORE [block.png]
"""

from __future__ import annotations

import sys

import numpy as np
import zarr


def as_float(block: np.ndarray, dtype: str) -> np.ndarray:
    """bf16 lies in the store as uint16, because zarr-python has no bfloat16: its bits are the upper half of a float32."""
    if dtype == "bfloat16":
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32)


def main(path: str, picture: str | None) -> None:
    group = zarr.open_group(f"{path}/blocks.zarr", mode="r")
    facts = group.attrs["kvtier"]
    print(f"model {facts['model_fingerprint'][:16]}, store format {facts['format']}")
    for name, array in sorted(group.arrays()):
        layout = array.attrs["kvtier"]["layout"]
        print(f"{name}: {layout['num_layers']} layers, {layout['block_size']} tokens per block, {layout['dtype']}")
        for slot in range(array.shape[0]):  # a slot that holds nothing reads as zeros
            block = as_float(np.asarray(array[slot]), layout["dtype"])
            if block.any():
                print(f"  slot {slot}: shape {block.shape}, |K, V| up to {np.abs(block).max():.3g}")
                break
        else:
            continue
        if picture:
            import matplotlib.pyplot as plot

            plot.imshow(block.reshape(-1, block.shape[-1]), aspect="auto", cmap="coolwarm")
            plot.title(f"{name}, slot {slot}")
            plot.savefig(picture)
            picture = None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
