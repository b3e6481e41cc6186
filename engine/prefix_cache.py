"""PrefixCache: K/V of prompts for pipelines that run their own model. Documents are computed once, by anyone, ever.

    n, past = cache.load(ids)                            # the longest stored prefix, ready for the model
    out = model(ids[n:], past_key_values=past)           # computes only what is missing
    cache.store(ids, past)                               # for the next prompt, process or day

Stored prefixes end where they end: whole blocks, and a partial tail under a key of its own. What load returns is what
was stored, or less: a lost or damaged block shortens the prefix. How a prompt becomes keys is left to the pager.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..pager.client.remote import block_size_at
from ..pager.config import PagerConfig, check_namespace
from ..pager.pager import Pager, open_pager
from ..pager.stores import NVME_DISK_SHARE, stored_block_size
from ..pager.tier_formats import device_layouts, split_device
from ..tiers.errors import BlockMissError, ConfigError
from ..tiers.formats import unpacked_layouts
from ..tiers.layout import KVLayout
from .kv_copy import GroupKV, KVCopier
from .kv_tensors import to_tensors
from .persisting import STORE_TIMEOUT_S, Persister
from .prefix_async import AsyncTwins
from .prefix_chunks import LOAD_TIMEOUT_S, PrefixChunks
from .prefix_hints import PrefixHints
from .prefix_ids import TokenIds, ids_of
from .prefix_input import check_heads, covered, digest, groups_of, layouts_of
from .prefix_stats import PrefixCounters
from .warming import Warmed, warm

BLOCK_SIZE = 32  # tokens; documents differ in length, and a question that follows one shares no block with another
DEVICE_BYTES, HOST_BYTES, NVME_BYTES = "256MiB", "1GiB", 16 << 30  # host memory is taken as it is used


class PrefixCache(PrefixHints, PrefixChunks, AsyncTwins):
    """Open with `PrefixCache.open`. Any method may be called from any thread; `aload`, `astore`, ... are for asyncio."""

    def __init__(
        self, pager: Pager, model: Any, spec: Any, namespace: str, device: torch.device, clock: Callable[[], float]
    ) -> None:
        self._pager, self._model, self._spec, self._namespace = pager, model, spec, namespace
        self._device, self._clock = device, clock
        self._copier = KVCopier(pager, clock)
        self._persister = Persister(pager, STORE_TIMEOUT_S)
        self._counters = PrefixCounters()
        self._changed = threading.Condition()
        self._num_calls = 0
        self._is_closed = False
        self._pins: list[tuple[float, int]] = []  # (until_s, sequence that holds the blocks)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        model: Any = None,
        layout: KVLayout | Sequence[KVLayout] | None = None,
        *,
        namespace: str = "default",
        device_bytes: int | str = DEVICE_BYTES,
        host_bytes: int | str = HOST_BYTES,
        nvme_bytes: int | str | None = None,
        block_size: int | None = None,
        model_fingerprint: str = "",
        pager: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ) -> PrefixCache:
        """Open or create the store at `path` (None: memory only) for a model.

        `model`: a Hugging Face decoder; what its K/V look like is found by running two tokens through it. Or `layout`:
        one KVLayout per layer group of your own model, and `model_fingerprint`, text that changes whenever its K/V do.
        `pager`: instead of `path`, the address of a daemon (unix:///... or tls://host:port) that many processes share.
        `block_size`: tokens per block, for a new store (default 32). `settings` are further ones of PagerConfig; with
        `device` ("int8", say) store packs whole blocks and load gives what the format kept of them, the same every time:
        in int8 a key is off by at most a 254th of the largest in its channel and block, a value of those in its token.
        Units: device_bytes (CPU memory, or the model's GPU) is room to write through and for the most recent blocks;
        host_bytes is taken as it is used; nvme_bytes is 16 GiB, or most of a smaller disk, when not given.
        Raises: ConfigError, UnsupportedModelError, StoreMismatchError (a store of another model), StoreLockedError (one
        that another process has open: one process at a time).
        """
        spec, layouts, device, about = None, layouts_of(model, layout, model_fingerprint), torch.device("cpu"), {}
        if model is not None:
            from .hf import describe, fingerprint
            from .past import discover_cache

            spec = discover_cache(model)
            device, about, model_fingerprint = next(model.parameters()).device, describe(model), fingerprint(model)
        if unknown := settings.keys() - {f.name for f in fields(PagerConfig)}:
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}; further settings are those of PagerConfig")
        settings = {"backend": "cpu" if device.type == "cpu" else "cuda", "staging_bytes": 0} | settings
        config = PagerConfig(
            device_bytes,
            host_bytes,
            nvme_path=path,
            nvme_bytes=_default_nvme(path) if nvme_bytes is None else nvme_bytes,
            **settings,
        )
        check_namespace(namespace)
        if spec is not None:
            stored = stored_block_size(path) if pager is None else block_size_at(pager, model_fingerprint, config)
            layouts = spec.layouts(size := block_size or stored or BLOCK_SIZE)
            said, (config, cut) = config.device, split_device(config, layouts)
            check_heads(said, layouts, cut)
            layouts = (spec := spec.split(cut)).layouts(size)
        layouts = device_layouts(config, layouts)
        opened = open_pager(pager, layouts, config, model_fingerprint=model_fingerprint, about=about, clock=clock)
        try:
            return cls(opened, model, spec, namespace, device, clock)
        except BaseException:
            opened.close()
            raise

    # ------------------------------------------------------------------ what it is
    @property
    def pager(self) -> Pager:
        """The pager underneath, for status and checks."""
        return self._pager

    @property
    def layouts(self) -> tuple[KVLayout, ...]:
        """Of the K/V that load gives and store takes, in full precision."""
        return tuple(unpacked_layouts(self._pager.layouts))

    @property
    def block_size(self) -> int:
        return self._pager.block_size

    # ------------------------------------------------------------------ load and store
    def match(self, token_ids: TokenIds) -> int:
        """How many tokens of a prompt are stored, without reading them."""
        with self._call(), self._sequence() as seq:
            return self._pager.attach(seq, ids_of(token_ids), with_tail=True, count=False).tokens

    def load(
        self,
        token_ids: TokenIds,
        *,
        as_tensors: bool = False,
        leave_last: bool = True,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> tuple[int, Any]:
        """The longest stored prefix of a prompt: its number of tokens, and its K/V as a past for the model.

        At most len(token_ids) - 1 tokens, because a model needs one to run, unless leave_last=False (packed blocks are not
        cut: what would end inside one ends before it). The past is a
        DynamicCache on the model's device (empty when nothing is stored): run the model with it, then give it to store.
        With as_tensors=True, or a cache opened by layout: plain tensors, see kv_tensors.py.
        Raises: Busy when blocks did not come up within timeout_s.
        """
        ids = ids_of(token_ids)
        in_one = as_tensors or self._spec is None
        with self._call(), self._sequence() as seq:
            started_s = self._clock()
            match = self._pager.attach(seq, ids, with_tail=True)
            if match.tokens > len(ids) - leave_last:
                self._pager.truncate(seq, len(ids) - leave_last)
            groups = self._read(seq, in_one, timeout_s)
            loaded = groups[0].end
            self._counters.loaded(len(ids), loaded, _nbytes(groups), self._clock() - started_s)
        if in_one:
            return loaded, to_tensors(groups)
        from .past import make_past

        past = make_past(self._model, self._spec, groups)
        past.kvtier_prefix = (loaded, digest(ids[:loaded]))  # type: ignore[attr-defined]  # store checks it
        return loaded, past

    def store(
        self, token_ids: TokenIds, past: Any, *, durable: bool = False, timeout_s: float = STORE_TIMEOUT_S
    ) -> int:
        """Keep the K/V of a prompt; returns how many tokens were new. `past` may hold more tokens than are named.

        Written to the store in the background, by the time of flush() or close() at the latest; with durable=True
        before this returns. `past` must come from running the model on exactly these tokens: that is not checked, but
        for a past that load gave out for other ones.
        Raises: ConfigError for a past that cannot be stored, saying why; UnpackableError for values that the device
        tier's format cannot hold; TierFullError, TierUnavailableError; Busy where copies took longer than timeout_s.
        """
        with self._call():
            new, done = self._store(ids_of(token_ids), past, timeout_s)
            if durable:
                done.result(timeout_s)
        return new

    def _store(self, ids: list[int], past: Any, timeout_s: float = STORE_TIMEOUT_S) -> tuple[int, Future[None]]:
        """How many tokens were new, and what ends when all are durable."""
        groups = groups_of(past, ids, self.layouts, self._spec)
        with self._call():
            seq = self._pager.begin(self._namespace)
            try:
                match = self._pager.attach(seq, ids, with_tail=True, count=False)
                self._pager.append(seq, ids[match.tokens :])
                new = self._copier.write(seq, groups, require=covered(groups), timeout_s=timeout_s)
                self._pager.seal(seq)
            except BaseException:
                self._pager.finish(seq)
                raise
            self._counters.stored(len(ids), new)
            return new, self._persister.add(seq)

    def _persist_whole(self, ids: list[int]) -> Future[None] | None:
        """Where all of a prompt is stored already, by whomever: what ends when it is durable."""
        with self._call():
            seq, tokens = self._find(ids)
            if tokens == len(ids):
                return self._persister.add(seq)
            self._pager.finish(seq)
            return None

    def warm(
        self,
        documents: Iterable[TokenIds],
        *,
        progress: bool | Callable[[Warmed], None] = False,
        chunk_tokens: int = 512,
    ) -> Warmed:
        """Compute and store what is missing of each of these prefixes; durable when it returns.

        progress=True draws a line on stderr; a function is called after every chunk. Says what was computed.
        Raises: ConfigError for a cache opened without a model; else as store.
        """
        if self._model is None:
            raise ConfigError(
                "warm: this cache was opened by layout; open it with a model, or load, compute and store yourself"
            )
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={chunk_tokens}: need at least 1")
        done = warm(self, self._model, [ids_of(ids) for ids in documents], progress, chunk_tokens)
        self._counters.warmed(done.computed_tokens)
        return done

    def pin(self, token_ids: TokenIds, ttl: float) -> int:
        """Keep what is stored of a prefix from being evicted for `ttl` seconds; returns its number of tokens.

        Of this process: after a restart, pin again; `ttl` may be infinite, until close. Pinned blocks take part of
        nvme_bytes that others cannot have. Raises: ConfigError for a ttl that is not more than 0, and bad token_ids.
        """
        if not ttl > 0:  # nan too
            raise ConfigError(f"ttl={ttl!r}: give seconds, more than 0")
        with self._call():
            seq, tokens = self._find(token_ids)
            with self._changed:
                self._pins.append((self._clock() + ttl, seq))
            return tokens

    # ------------------------------------------------------------------ looking after itself
    def stats(self) -> dict[str, Any]:
        """Counters and levels as plain values: what was asked, loaded, stored, computed; what waits; the tiers."""
        status = self._pager.status()
        with self._changed:
            pinned = len(self._pins)
        return self._counters.to_dict() | {
            "waiting_stores": self._persister.num_open,
            "failed_stores": self._persister.num_failed,
            "pinned_prefixes": pinned,
            "lost_tokens": int(self._pager.counters.get("lost_tokens")),
            "block_size": self.block_size,
            "namespace": self._namespace,
            "tiers": status["tiers"],
        }

    def flush(self, timeout_s: float = STORE_TIMEOUT_S) -> None:
        """Wait until everything stored so far would survive a crash. Raises what kept it from that."""
        self._persister.flush(timeout_s)

    def close(self) -> None:
        """Make what was stored durable and end. What could not be written is logged and in stats; flush raises it."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.wait_for(lambda: not self._num_calls)
        try:
            self._persister.close()
            self._let_go_of_pins(float("inf"))
        finally:
            self._pager.close()

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside
    @contextmanager
    def _call(self) -> Iterator[None]:
        """Counts a call, so that close waits for it; ends pins that are over."""
        with self._changed:
            if self._is_closed:
                raise ConfigError("this prefix cache is closed; open it again")
            self._num_calls += 1
        try:
            self._let_go_of_pins(self._clock())
            yield
        finally:
            with self._changed:
                self._num_calls -= 1
                self._changed.notify_all()

    @contextmanager
    def _sequence(self) -> Iterator[int]:
        seq = self._pager.begin(self._namespace)
        try:
            yield seq
        finally:
            self._pager.finish(seq)

    def _let_go_of_pins(self, now_s: float) -> None:
        with self._changed:
            over = [seq for until_s, seq in self._pins if until_s <= now_s]
            self._pins = [pin for pin in self._pins if pin[0] > now_s]
        for seq in over:
            self._pager.finish(seq)

    def _read(self, seq: int, in_one: bool, timeout_s: float) -> list[GroupKV]:
        while True:  # each miss leaves fewer tokens
            try:
                return self._copier.read(seq, self._device, in_one=in_one, timeout_s=timeout_s)
            except BlockMissError:
                pass


def _nbytes(groups: Sequence[GroupKV]) -> int:
    return sum(x.numel() * x.element_size() for group in groups for pair in group.layers for x in pair)


def _default_nvme(path: str | os.PathLike[str] | None) -> int | None:
    if path is None:
        return None
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    return min(NVME_BYTES, int(shutil.disk_usage(there).free * NVME_DISK_SHARE))
