"""Attention of the same query rows over chunks of whole blocks that come one after another: a streamed context.

On a CPU what counts for few rows (decode) is the number of calls per chunk: each finds its code and data swept out of the
caches by the chunk before, and costs ten times what it costs alone. So the pages' partial results are only collected, and
merged once in many chunks. Many rows (prefill), and a GPU, merge chunk by chunk. Guards: nothing is merged twice, and
chunks without keys leave the result alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .checks import check_cache, check_states
from .cpu_inplace import is_in_place, merge_pages
from .cpu_layer import PagedLayer
from .cpu_tile import attend_pages
from .dispatch import block_attention, merge_states
from .grad import without_grad

MAX_PARTS_BYTES = 1 << 20  # partial results that wait to be merged stay in a core's cache
FEW_ROWS = 16  # of more, arithmetic and not memory is what a chunk costs


@contextmanager
def beside_copies(q: Tensor) -> Iterator[None]:
    """Leave a CPU's last core to the copies of chunks to come, while a few rows attend to those that are here.

    A parallel region that shares a core with a copy ends when the scheduler lets it, milliseconds late. (A thread that
    uses torch for the first time meanwhile keeps one thread less.)
    """
    count = torch.get_num_threads()
    if count == 1 or q.is_cuda or len(q) > FEW_ROWS:
        yield
        return
    torch.set_num_threads(count - 1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


class ChunkedAttention:
    """Rows q [T, Hq, D] against keys that no row is masked from; chunks may be overwritten once they are added."""

    def __init__(self, q: Tensor, *, scale: float, softcap: float | None = None) -> None:
        self._q, self._scale, self._softcap = q, scale, softcap or None
        self._state: tuple[Tensor, Tensor] | None = None
        self._folded: Tensor | None = None  # q as [1, Hkv, rows, D], where pages are attended in place
        self._pages_shape: torch.Size | None = None  # of one page of the chunks so far
        self._parts: list[tuple[Tensor, Tensor]] = []  # out [p, Hkv, rows, Dv], lse [p, Hkv, rows]
        self._parts_bytes = 0

    @without_grad
    def add_result(self, out: Tensor, lse: Tensor) -> None:
        """What the rows saw elsewhere. Shapes: out [T, Hq, Dv], float32; lse [T, Hq]; -inf: no key."""
        check_states(out, lse, "result")
        self._state = (out, lse) if self._state is None else merge_states(*self._state, out, lse)

    @without_grad
    def add(self, k: Tensor, v: Tensor) -> None:
        """Attend every row to every token of these blocks. Shapes: k [m, Hkv, block, D], v [m, Hkv, block, Dv], views.

        Raises: ValueError for shapes that do not fit the rows or the chunks before.
        """
        if k.shape[1:] != self._pages_shape:
            self._look_at(k, v)
        if self._folded is None:
            kind: dict[str, Any] = dict(scale=self._scale, softcap=self._softcap, out_dtype=torch.float32)
            self.add_result(*block_attention(self._q, k, v, **kind))
        elif len(k):
            out, lse = attend_pages(self._folded.expand(len(k), -1, -1, -1), k, v, scale=self._scale)
            self._parts.append((out, lse))
            self._parts_bytes += out.nbytes
            if self._parts_bytes > MAX_PARTS_BYTES:
                self._parts = [self._merged()]
                self._parts_bytes = self._parts[0][0].nbytes

    @without_grad
    def result(self) -> tuple[Tensor, Tensor]:
        """Of everything added so far. Shapes: out [T, Hq, Dv], float32; lse [T, Hq], nats."""
        if self._parts:
            (tokens, heads), (out, lse) = self._q.shape[:2], self._merged()
            self._parts, self._parts_bytes = [], 0
            # rows of a KV head: its G query heads, each with all T tokens
            out = out[0].unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).reshape(tokens, heads, -1)
            self.add_result(out, lse[0].unflatten(1, (-1, tokens)).permute(2, 0, 1).reshape(tokens, heads))
        if self._state is None:
            raise RuntimeError("ChunkedAttention: result before anything was added")
        return self._state

    def _look_at(self, k: Tensor, v: Tensor) -> None:
        """Check the first chunk, and choose how it and its like are attended."""
        if self._pages_shape is not None:
            raise ValueError(f"pages of {tuple(k.shape[1:])} after pages of {tuple(self._pages_shape)}")
        check_cache(self._q, k, v)
        self._pages_shape = k.shape[1:]
        if self._q.is_cuda:
            return
        layer = PagedLayer(k, v, self._scale, self._softcap)
        if is_in_place(layer, len(self._q) * (self._q.shape[1] // k.shape[1])):
            self._folded = layer.fold(self._q).flatten(1, 2)[None]

    def _merged(self) -> tuple[Tensor, Tensor]:
        """The collected parts as one, out [1, Hkv, rows, Dv] in float32."""
        out, lse = torch.cat([out for out, _ in self._parts]), torch.cat([lse for _, lse in self._parts])
        return merge_pages(out, lse) if len(out) > 1 else (out.float(), lse)
