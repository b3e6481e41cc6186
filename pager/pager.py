"""Pager: the public face. Sequences, leases, hints, sessions and status, for one process.

    engine --- begin / attach / append / lease / commit / park ---> Pager --- core, leasing, prefix, parking ---> groups

Every public call may be made from any thread; a call that can wait takes timeout_s. The daemon will serve this same
interface. A cache of ours may answer "miss" at any time; it never answers wrong and never stops its engine.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tiers.backends import get_backend
from ..tiers.errors import Busy, ConfigError
from ..tiers.formats import BlockFormat, tail_of
from ..tiers.layout import KVLayout
from ..tiers.streams import Backend
from . import hints
from .accounting import Counters
from .config import PagerConfig
from .core import Core
from .group import BlockGroup
from .inspection import requests
from .inspection.observer import OnAnswered
from .inspection.service import InspectionService
from .lease import Lease, Span
from .lease_keeping import LeaseKeeper
from .leasing import LeaseFiller
from .lookups import begin_turn, count_lookup
from .page_table import Sequence as TokenSequence
from .page_table import num_blocks_of
from .parking import Parking
from .policies.base import FloatArray
from .prefetching import Prefetcher
from .prefix import Match, adopt, adopt_tail, bring_back_s, next_cached_block, peek, residency, rewind
from .reading import BlockReader, HeldBlocks
from .rules import ALL_RULES, Rules
from .sessions import ParkedSession, SessionEntry
from .sizing import plan_sizes
from .states import NOWHERE, PageState, SlotState
from .status import pager_status
from .stores import open_nvme, stored_block_size
from .tier_formats import check_available, host_formats, roundings

if TYPE_CHECKING:
    from ..tiers.nvme.calls import SystemCalls
    from .client.remote import Remote

_IDLE_LOOK_S = 0.5  # the background thread looks this often even when nothing signals progress


class Pager:
    """Moves KV blocks between device, host and nvme; hands out leases on resident pages."""

    def __init__(self, core: Core, remote: Remote | None = None) -> None:
        self._core, self._remote = core, remote
        self._filler, self._keeper = LeaseFiller(core), LeaseKeeper(core)
        self._parking = Parking(core)
        self._prefetcher = Prefetcher(core)
        self._reader = BlockReader(core)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._status_server: InspectionService | None = None
        self._is_closed = False

    @classmethod
    def open(
        cls,
        layout: KVLayout | Sequence[KVLayout],
        config: PagerConfig,
        *,
        model_fingerprint: str = "",
        about: Mapping[str, Any] | None = None,
        backend: Backend | None = None,
        clock: Callable[[], float] = time.monotonic,
        calls: SystemCalls | None = None,
        rules: Rules = ALL_RULES,
    ) -> Pager:
        """Open an embedded pager over one layout, or one per layer group.

        `about` describes the model (RoPE, say) in the Zarr attributes of a new store, for whoever opens it without kvtier.
        `backend`, `clock`, `calls` (of the store to the kernel) and `rules` are for tests and measurements.
        Raises: ConfigError when a setting is refused, a tier is too small, or the store cannot be used
        (StoreMismatchError: another model, layout or format; StoreLockedError: another process has it).
        """
        layouts = _layouts(layout)
        config.validate()
        if config.transfer != "client":
            raise ConfigError(
                f"transfer={config.transfer!r} without a daemon: it says who copies; give pager='unix:///...'"
            )
        check_available(config, layouts)
        sizes = plan_sizes(
            layouts,
            config.device_size,
            config.host_size,
            config.staging_size,
            config.nvme_path is not None,
            host_formats(config, layouts),
            config.selection_size,
        )
        owned = backend is None
        backend = backend or get_backend(config.backend, io_depth=config.queue_depth())
        nvme = None
        try:
            if config.require_pinned and not backend.pinned:
                raise ConfigError("require_pinned=True, but this backend cannot pin host memory; see `kvtier doctor`")
            nvme = open_nvme(layouts, config, backend, model_fingerprint, about or {}, calls)
            pager = cls(Core(layouts, config, sizes, backend, nvme, model_fingerprint, rules, clock))
            pager._parking.recover()
        except BaseException:  # no memory for a tier, say, or a session of another format: leave no lock, no thread
            if nvme is not None:
                nvme.close()
            if owned:
                backend.close(5.0)
            raise
        pager._start()
        return pager

    @classmethod
    def connect(
        cls,
        address: str,
        layout: KVLayout | Sequence[KVLayout],
        config: PagerConfig,
        *,
        model_fingerprint: str = "",
        about: Mapping[str, Any] | None = None,
        token: str = "",
        name: str = "",
        share_memory: bool = True,
        backend: Backend | None = None,
        clock: Callable[[], float] = time.monotonic,
        rules: Rules = ALL_RULES,
    ) -> Pager:
        """A pager over the memory of a daemon at `address`, shared with its other clients: unix:///path/of/pagerd.sock,
        or tls://host:port with config.pager_token_file and pager_ca.

        Of the configuration, device_bytes and how it is used count; host tier and store are the daemon's (host_bytes is
        a private host tier where its memory is not mapped: another user, or share_memory=False). `name` is for its logs.
        When the daemon goes, the pager goes on with what it has, and is attached again when one is there.
        Raises: ConfigError, TierUnavailableError when no daemon answers, ProtocolError when it refuses us.
        """
        from .client.address import read_token
        from .client.connection import Greeting
        from .client.remote import Remote
        from .wire.messages import ALL_FEATURES, BYTES, FEATURES

        layouts = _layouts(layout)
        config.validate()
        wanted = ALL_FEATURES if config.transfer == "ipc" else FEATURES
        features = wanted if share_memory else (BYTES,)
        greeting = Greeting(name, token or read_token(config.pager_token_file), features, ca_file=config.pager_ca)
        owned = backend is None
        backend = backend or get_backend(config.backend, io_depth=config.queue_depth())
        try:
            core, remote = Remote.connect(
                address,
                layouts,
                config,
                backend,
                model_fingerprint=model_fingerprint,
                about=about or {},
                greeting=greeting,
                rules=rules,
                clock=clock,
            )
        except BaseException:
            if owned:
                backend.close(5.0)
            raise
        pager = cls(core, remote)
        pager._start()
        remote.start(pager._wake.set)
        return pager

    # ------------------------------------------------------------------ what it is
    @property
    def layouts(self) -> tuple[KVLayout, ...]:
        return self._core.layouts

    @property
    def model_fingerprint(self) -> str:
        """What the blocks' keys say of the model, as it was given to `open`."""
        return self._core.model_fingerprint

    @property
    def block_size(self) -> int:
        return self._core.block_size

    @property
    def backend(self) -> Backend:
        return self._core.backend

    @property
    def policy(self) -> str:
        """Name of the order in which blocks leave a tier."""
        return self._core.config.policy

    @property
    def weighs_mass(self) -> bool:
        """Whether the policy wants to know how much attention blocks draw (`note_mass`)."""
        return self.policy == "importance"

    @property
    def counters(self) -> Counters:
        return self._core.counters

    def device_rows(self, group: int) -> Any:
        """The device pool of a layer group: uint8 rows [pages, block_bytes] at a stable address."""
        return self._core.groups[group].pool.rows

    def staging_rows(self, group: int) -> Any:
        """Device memory of a layer group's staging ring: uint8 rows [rows, layer_bytes] at a stable address, or None."""
        ring = self._core.rings[group]
        return None if ring is None else ring.rows

    def readable_host_rows(self, group: int) -> Any:
        """Host slots of a layer group that a step reads in place: uint8 rows [slots, block_bytes] at a stable address,
        or None."""
        return self._core.groups[group].forms.rows_like_pages

    @property
    def can_select(self) -> bool:
        """Whether device memory is set apart for selected attention."""
        return any(cache is not None for cache in self._core.slice_caches)

    def summary_rows(self, group: int) -> Any:
        """Device memory for key summaries of a layer group: uint8 rows, one per block; none without selection_bytes."""
        return self._core.summary_rows[group]

    def roundings(self, group: int) -> list[BlockFormat]:
        """Formats of fewer bits in which blocks of a layer group may have been, from the highest tier down."""
        return roundings(self._core.config, self.layouts)[group]

    def capacity_tokens(self) -> int:
        """Tokens of one sequence that all tiers together can hold."""
        return (
            min((self._blocks_held(i) - 2) * self.block_size for i, g in enumerate(self.layouts) if g.window is None)
            if any(g.window is None for g in self.layouts)
            else 1 << 40
        )

    def _blocks_held(self, index: int) -> int:
        """Blocks that can be stored at once. The cold tier must take all that the others push down."""
        group = self._core.groups[index]
        below = group.cold.tier.num_slots(index) if group.cold is not None else len(group.host)
        if self._core.rings[index] is None:
            return len(group.pages)
        return below + len(group.pages) if group.cold is None else max(below, len(group.pages))

    def max_span_tokens(self) -> int:
        """Longest span that a lease can take whatever the context is (streaming the rest of it)."""
        spans = []
        for index, group in enumerate(self._core.groups):
            spare = len(group.pages) - 3
            window = group.layout.window
            if window is not None:
                spare -= num_blocks_of(window + group.layout.sinks, self.block_size) + 1
            elif self._core.rings[index] is not None:
                kept = self.layouts[tail_of(self.layouts, index)].num_kept  # resident too, though unread
                spare = min(len(group.pages) // 2, len(group.pages) - kept - 1)  # half is for resident context
            spans.append(max(spare, 0) * self.block_size)
        return min(spans)

    # ------------------------------------------------------------------ sequences
    def begin(self, namespace: str = "default") -> int:
        """A new, empty sequence. Raises ConfigError for a namespace that the daemon does not let us use."""
        if self._remote is not None:
            self._remote.check_owned(namespace)
        with self._core.lock:
            return self._core.begin(namespace).id

    def append(self, seq: int, token_ids: Sequence[int]) -> None:
        """Tokens that the sequence is going to compute, in order."""
        with self._core.lock:
            state = self._core.sequence(seq)
            if state.session_id is not None:
                self._prefetcher.began(state.session_id, state)
            state.token_ids.extend(token_ids)

    def token_ids(self, seq: int, start: int = 0, end: int | None = None) -> list[int]:
        """The known tokens [start, end) of a sequence, computed or not."""
        return self._core.sequence(seq).token_ids[start:end]

    def namespace(self, seq: int) -> str:
        return self._core.sequence(seq).namespace

    def num_tokens(self, seq: int) -> int:
        return len(self._core.sequence(seq).token_ids)

    def num_computed(self, seq: int) -> int:
        return self._core.sequence(seq).num_computed

    def match(self, token_ids: Sequence[int], namespace: str = "default") -> Match:
        """The longest usable cached prefix of a prompt, by tier. Changes nothing, counts nothing."""
        if self._remote is not None:
            self._remote.find_prompt(namespace, token_ids, with_tail=False)
        with self._core.locked():
            return peek(self._core, namespace, token_ids)

    def residency(self, seq: int) -> Match:
        """The computed tokens of a sequence, by the slowest tier that its next step reads them from."""
        with self._core.locked():
            return residency(self._core, self._core.sequence(seq))

    def attach(self, seq: int, token_ids: Sequence[int], *, with_tail: bool = False, count: bool = True) -> Match:
        """An empty sequence takes over the longest cached prefix of these tokens. Append the rest afterwards.

        Afterwards the sequence's token ids are the matched prefix. Hits are counted for the tier that holds them now
        (unless `count` is False). `with_tail`: whole blocks, then a sealed tail that continues them, where there is one.
        """
        if self._remote is not None:
            self._remote.find_prompt(self.namespace(seq), token_ids, with_tail=with_tail)
        with self._core.locked():
            state = self._core.idle_sequence(seq, "attaching")
            if state.token_ids:
                raise ConfigError(f"sequence {seq} is not empty; attach comes first, then append")
            state.token_ids = list(token_ids)
            match = adopt(self._core, state, len(state.token_ids))
            self._prefetcher.began_chain(state)
            if with_tail:
                match += adopt_tail(self._core, state, len(state.token_ids))
            if count:
                count_lookup(self._core, state, len(token_ids), match)
            asked = state.keys[: len(token_ids) // self.block_size]
            del state.token_ids[state.num_computed :]
            del state.keys[state.num_computed // self.block_size :]  # what is appended next may be something else
        if count and self._remote is not None:
            self._remote.used(asked, len(token_ids), match)
        return match

    def adopt(self, seq: int) -> Match:
        """A sequence of known tokens, none of them computed, takes over their longest cached prefix but the last token.

        Hits are counted for the tier that holds them now.
        """
        if self._remote is not None:
            self._remote.find_prompt(self.namespace(seq), self.token_ids(seq), with_tail=False)
        with self._core.locked():
            state = self._core.idle_sequence(seq, "adopting")
            match = adopt(self._core, state, len(state.token_ids) - 1)
            self._prefetcher.began_chain(state)
            num_tokens = len(state.token_ids) - 1
            count_lookup(self._core, state, num_tokens, match)
            asked = state.keys[: num_tokens // self.block_size]
        if self._remote is not None:
            self._remote.used(asked, num_tokens, match)
        return match

    def turn(self, seq: int, token_ids: Sequence[int]) -> Match:
        """The next message of a conversation: append it, and count the request that answers it.

        Returns what the cache has of the sequence, by the tier that holds it now; of a resumed one, that held it then.
        """
        with self._core.locked():
            state = self._core.idle_sequence(seq, "its next turn")
            self._core.observer.ended(state)
            self.append(seq, token_ids)
        if self._remote is not None:
            self._remote.find_next(state, len(token_ids) + 1)
        with self._core.locked():
            match, num_tokens = begin_turn(self._core, state), len(state.token_ids) - 1
            asked = state.keys[: num_tokens // self.block_size]
        if self._remote is not None:
            self._remote.used(asked, num_tokens, match, is_turn=True)
        return match

    def plan_prefill(self, seq: int, max_tokens: int) -> int:
        """How many tokens to compute next, at most max_tokens; adopts first what others have computed meanwhile.

        Never reaches into a block that is cached already (a sequence that lost one block computes only that one), and
        leaves the last token to compute, because its logits are stored nowhere.
        """
        if self._remote is not None:
            self._remote.find_next(self._core.sequence(seq), max_tokens)
        with self._core.locked():
            state = self._core.idle_sequence(seq, "planning")
            if state.num_computed % self.block_size == 0:
                adopt(self._core, state, len(state.token_ids) - 1)
            end = min(len(state.token_ids), state.num_computed + max_tokens)
            cached = next_cached_block(self._core, state, end)
            if cached is not None and cached * self.block_size < end:
                end = cached * self.block_size
            return end - state.num_computed

    def pages_needed(self, work: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What it takes to run these (sequence, new tokens) in turns without moving blocks between them.

        Per layer group: pages of all their visible context, shared ones once, and of the new tokens; and the pages that they
        can have, which are all but those of blocks that are pinned for a time and that none of them reads.
        """
        with self._core.lock:
            return self._filler.pages_needed([(self._core.sequence(seq), count) for seq, count in work])

    def block_keys(self, seq: int, start: int, end: int) -> list[bytes]:
        """Keys of the whole blocks that lie within the known tokens [start, end) of a sequence."""
        with self._core.lock:
            state, size = self._core.sequence(seq), self.block_size
            end = min(end, len(state.token_ids))
            if len(state.keys) < end // size:  # else it would begin with a copy of all token ids
                state.chain.extend(state.keys, state.token_ids[: end // size * size])
            return state.keys[num_blocks_of(start, size) : end // size]

    def truncate(self, seq: int, num_tokens: int) -> int:
        """Forget the tokens past num_tokens. Returns how many of the rest still count as computed."""
        with self._core.locked():
            state = self._core.idle_sequence(seq, "truncating")
            if not 0 <= num_tokens <= len(state.token_ids):
                raise ConfigError(f"truncate: num_tokens={num_tokens}, the sequence has {len(state.token_ids)}")
            del state.token_ids[num_tokens:]
            del state.keys[num_tokens // self.block_size :]
            state.resumed = None
            if state.branch is not None and num_tokens <= state.branch[0]:
                state.branch, state.chain = None, self._core.chain(state.namespace)
            rewind(self._core, state, min(num_tokens, state.num_computed))
            return state.num_computed

    def room_to_draft(self, seq: int) -> int:
        """Tokens behind the next one that a step can compute and truncate again without having to compute others anew.

        Any number, but where pages are packed: there a block that was whole once has lost its tail.
        """
        if not any(layout.is_tail for layout in self.layouts):
            return 1 << 30
        return max(0, self.block_size - 2 - self._core.sequence(seq).num_computed % self.block_size)

    def branch(self, seq: int) -> None:
        """What is computed from here on saw only part of its context: name those blocks apart from exact ones.

        Nobody else finds them by their tokens, but forks of this sequence and itself, also after park and resume.
        """
        with self._core.locked():
            state = self._core.idle_sequence(seq, "branching")
            if state.branch is None:
                state.branch_at(state.num_computed, secrets.token_hex(8))

    def is_branched(self, seq: int) -> bool:
        """Whether some of its K/V are approximate."""
        return self._core.sequence(seq).branch is not None

    def fork(self, seq: int) -> int:
        """A second sequence over the same blocks; whoever writes first copies."""
        with self._core.locked():
            parent = self._core.idle_sequence(seq, "forking")
            child = self._core.begin(parent.namespace)
            child.token_ids, child.keys = list(parent.token_ids), list(parent.keys)
            child.num_computed = parent.num_computed
            child.branch, child.chain = parent.branch, parent.chain
            child.tables = [table.copy() for table in parent.tables]
            for group, table in zip(self._core.groups, child.tables, strict=True):
                group.ref(table.ids[table.ids >= 0])
            return child.id

    def finish(self, seq: int) -> None:
        """The sequence ends; its blocks stay as cache by recency."""
        self._end(seq, released=False)

    def release(self, seq: int) -> None:
        """The sequence ends and will not be used again: its blocks are the first to leave every tier.

        But for those at its beginning that other sequences have continued otherwise: these are cache, by recency.
        """
        self._end(seq, released=True)

    def _end(self, seq: int, *, released: bool) -> None:
        with self._core.locked():
            state = self._core.idle_sequence(seq, "ending it")
            self._core.observer.ended(state)
            if not released and state.session_id is None:
                self._prefetcher.ended_chain(state)
            keys = self._keys_of(state) if released and self._remote is not None else []
            self._core.drop_tables(state, released=released)
            del self._core.sequences[seq]
        if self._remote is not None and released:
            self._remote.hint(keys, "release")
        if self._remote is not None and state.session_id is not None:
            self._remote.give_back_session(state.session_id, self._parking)

    def _keys_of(self, seq: TokenSequence) -> list[bytes]:
        """Of its computed whole blocks."""
        count = seq.num_computed // self.block_size
        seq.chain.extend(seq.keys, seq.token_ids[: count * self.block_size])
        return seq.keys[:count]

    # ------------------------------------------------------------------ leases
    def lease(
        self,
        spans: Sequence[Span],
        *,
        timeout_s: float = 30.0,
        allow_streaming: bool = True,
        write_only: bool = False,
        selected: bool = False,
    ) -> Lease:
        """Pages for one step: context resident and pinned (or streamed, one span only), new tokens with a place.

        `write_only`: for K/V that were computed elsewhere. The context stays where it is; tables list only the blocks
        that get new tokens, so they serve for writing and not for attention.
        `selected`: the step picks which context blocks it reads, layer by layer (Lease.pick). Whole context blocks of
        full-attention groups stay where they are. Needs selection_bytes.
        Raises: TierFullError when these spans cannot be pinned together (take fewer, or shorter ones); BlockMissError
        when a block is lost (num_valid tokens still count, compute from there); Busy after timeout_s.
        """
        if selected and not self.can_select:
            raise ConfigError(
                f"selected attention needs device memory for key summaries and picked slices: selection_bytes="
                f"{self._core.config.selection_bytes!r}; give it an eighth of device_bytes, say"
            )
        lease = Lease(self._keeper, list(spans), is_write_only=write_only, is_selected=selected)
        try:
            self._filler.fill(lease, timeout_s, allow_streaming)
        except BaseException:
            lease.release()
            raise
        return lease

    def note_mass(self, lease: Lease, group: int, span: int, mass: FloatArray) -> None:
        """How much attention the newest token of a span gave to each block that its table lists, in any unit; [width].

        While the lease is held. Without a policy that weighs it nothing changes.
        """
        held = lease.groups[group]
        blocks = self._core.groups[group].pages.block[
            held.tables[span][: num_blocks_of(held.kv_lens[span], self.block_size)]
        ]
        mass = mass[: len(blocks)]
        if len(mass) and (most := float(mass.max())) > 0:
            with self._core.lock:
                self._core.groups[group].policy.on_mass(blocks, mass / most)

    # ------------------------------------------------------------------ K/V in and out without a model step
    def read_blocks(self, seq: int, group: int, *, timeout_s: float = 30.0) -> Generator[HeldBlocks]:
        """Visit the blocks of one layer group that the sequence's next token sees, each in the fastest tier that holds it.

        Nothing is promoted to the device tier. A piece is held until the next is asked for; close the iterator when
        stopping early. The sequence counts as leased meanwhile.
        Raises: BlockMissError when a block is lost (num_valid tokens still count; start again); Busy after timeout_s.
        """
        return self._reader.read(seq, group, timeout_s)

    def seal(self, seq: int) -> None:
        """Name the partial tail block of a sequence that ends here, so that attach(with_tail=True) finds it."""
        self._parking.seal(self._core.idle_sequence(seq, "sealing"))

    def persist(self, seqs: Sequence[int], *, timeout_s: float = 120.0) -> None:
        """Make what continuing these sequences needs durable, partial tails included; they stay as they are.

        Without this (or park), blocks are cache: what only the device or host tier holds ends with the process.
        Raises: TierFullError or TierUnavailableError when something could not be written.
        """
        self._parking.persist([self._core.idle_sequence(seq, "persisting") for seq in seqs], timeout_s)

    # ------------------------------------------------------------------ hints
    def pin(self, seq: int, ttl_s: float) -> None:
        """Keep the blocks of this sequence from leaving any tier for ttl_s seconds, also after it has ended."""
        with self._core.lock:
            until_s, state = self._core.clock() + ttl_s, self._core.sequence(seq)
            for group, table in zip(self._core.groups, state.tables, strict=True):
                hints.pin(group, table.ids[table.ids >= 0], until_s)
            if self._remote is not None:
                self._remote.mark(self._keys_of(state), "pin", ttl_s)

    def prefetch(self, seqs: int | Sequence[int], *, for_anybody: bool = False) -> int:
        """These sequences, or requests with their known tokens, run soon: bring up what they will read, before anybody waits.

        Takes room that is free or holds cache that nobody refers to, a little at a time, in this order and that of the last
        calls. With `for_anybody` it goes on when they have ended: somebody will come with these tokens. Returns how many
        copies started now.
        """
        with self._core.locked():
            named = [self._core.sequence(seq) for seq in ([seqs] if isinstance(seqs, int) else seqs)]
            started = self._prefetcher.start(named, for_anybody=for_anybody)
            for group in self._core.groups if named else ():
                left = len(named[0].token_ids) - named[0].num_computed
                group.pressure.queued = num_blocks_of(min(left, group.layout.window or left), self.block_size)
            if self._remote is not None:
                for seq in named:
                    whole = len(seq.token_ids) // self.block_size
                    if len(seq.keys) < whole:  # else it would begin with a copy of all token ids
                        seq.chain.extend(seq.keys, seq.token_ids[: whole * self.block_size])
                    self._remote.expect(seq.id, seq.keys)
            return started

    def take_turns(self, seqs: Sequence[int]) -> None:
        """These sequences run in turns from now on, and those of the last call no longer, unless they are among these.

        What they read next leaves the device tier last, and of the host tier what has yet to come up. For sequences whose
        pages fit the device tier together: see pages_needed.
        """
        with self._core.lock:
            found = tuple([self._core.sequence(seq) for seq in seqs])
            for group in self._core.groups:
                group.working.sequences = found

    def bring_up(self, seq: int) -> int:
        """Start the copies that the next tokens of this sequence wait for, evicting for them as a lease would.

        Returns how many blocks are not readable yet; 0 means that a lease would not wait.
        """
        with self._core.locked():
            return self._filler.bring_up(self._core.sequence(seq))

    def seconds_to_bring_back(self, seqs: Sequence[int]) -> list[float]:
        """What it would take to make each of these sequences' blocks resident again if its pages were given up now.

        From the rates that copies have had in this pager (the usual ones before there were any).
        """
        with self._core.lock:
            return bring_back_s(self._core, [self._core.sequence(seq) for seq in seqs])

    def note_computing(self, tokens: int, seconds: float) -> None:
        """Tell that the K/V of so many tokens of prompts took so long: what loading is weighed against."""
        with self._core.lock:
            self._core.costs.note_computing(tokens, seconds)

    @property
    def compute_s_per_token(self) -> float:
        """As told lately by `note_computing`; 0 before anything was."""
        return self._core.costs.compute_s_per_token

    def discard(self, seq: int) -> None:
        """Compute this sequence anew when it runs again; its blocks are the first to leave, its token ids stay."""
        with self._core.locked():
            self._core.drop_tables(self._core.idle_sequence(seq, "discarding"), released=True)

    def demote(self, seq: int) -> None:
        """This sequence will not run soon: give its pages back, writing down what is dirty.

        Blocks that those read who run in turns (take_turns) stay: a shared prefix is still in use.
        """
        with self._core.locked():
            for group, table in zip(self._core.groups, self._core.idle_sequence(seq, "demoting").tables, strict=True):
                blocks = table.ids[table.ids >= 0]
                blocks = blocks[~group.working.holds(blocks)]
                pages = group.directory.page[blocks]
                state = group.pages.state[np.maximum(pages, 0)]
                idle = (pages >= 0) & group.pages.idle()[np.maximum(pages, 0)]
                group.evict(blocks[idle & (state == PageState.RESIDENT)], "demote")
                self._core.write_back_blocks(group, blocks[idle & (state == PageState.DIRTY)], "demote")
                hints.demote(group, blocks)
            if self._remote is not None:
                self._remote.mark(self._keys_of(self._core.sequence(seq)), "demote")

    def make_clean(self, seq: int) -> None:
        """This sequence may soon have to give its pages back: copy down what only they hold. It goes on meanwhile."""
        with self._core.locked():
            for group, table in zip(self._core.groups, self._core.sequence(seq).tables, strict=True):
                pages = group.directory.page[table.ids[table.ids >= 0]]
                pages = pages[pages >= 0]
                dirty = pages[(group.pages.state[pages] == PageState.DIRTY) & group.pages.idle()[pages]]
                self._core.write_back_blocks(group, group.pages.block[dirty], "writeback", keep_clean=True)

    # ------------------------------------------------------------------ sessions
    def park(self, session_id: str, seq: int, extra: dict[str, Any] | None = None, *, timeout_s: float = 120.0) -> None:
        """Remember a whole session and give its pages back. Durable when there is an nvme tier. Consumes the sequence.

        Raises: TierFullError or TierUnavailableError when it could not be written; the sequence is then as it was.
        """
        state = self._core.idle_sequence(seq, "parking")
        self._parking.park(session_id, state, extra or {}, timeout_s)
        with self._core.lock:
            self._prefetcher.ended(session_id, state)
        if self._remote is not None:
            self._remote.give_back_session(session_id, self._parking)

    def checkpoint(
        self, session_id: str, seq: int, extra: dict[str, Any] | None = None, *, timeout_s: float = 120.0
    ) -> None:
        """Remember a session as it is now and let it go on: after a crash it resumes here. Nothing leaves the device.

        The sequence must not be leased meanwhile. Raises as park does; without an nvme tier only this process remembers.
        """
        state = self._core.idle_sequence(seq, "checkpointing")
        self._parking.checkpoint(session_id, state, extra or {}, timeout_s)
        with self._core.lock:
            self._prefetcher.ended(session_id, state, is_open=True)

    def resume(self, session_id: str, namespace: str = "default") -> tuple[int, ParkedSession]:
        """Bring a parked session back as a sequence; its blocks start to come up in the background."""
        if self._remote is not None:
            self._remote.take_session(session_id, namespace)
        state, parked = self._parking.resume(session_id, namespace)
        with self._core.locked():
            self._prefetcher.began(session_id, state)
            self._prefetcher.start([state])
        return state.id, parked

    def forget(self, session_id: str, *, released: bool = False) -> None:
        """Delete a parked session; its blocks become ordinary cache, or with `released` the first to leave every tier."""
        with self._core.lock:
            self._prefetcher.forget(session_id)
        if self._remote is not None and session_id not in self._core.sessions:
            self._remote.forget_session(session_id, released=released)
        else:
            self._parking.forget(session_id, released=released)

    def sessions(self) -> dict[str, dict[str, Any]]:
        """Known sessions: tokens, whether active (here or in another client), whether durable."""
        others = self._remote.sessions() if self._remote is not None else {}
        with self._core.lock:
            return others | {name: self._told(entry) for name, entry in self._core.sessions.items()}

    def session(self, session_id: str) -> dict[str, Any] | None:
        """The one of `sessions` with that id, without a look at the others of this process; None where there is none."""
        with self._core.lock:
            entry = self._core.sessions.get(session_id)
            if entry is not None:
                return self._told(entry)
        return None if self._remote is None else self._remote.sessions().get(session_id)

    def _told(self, entry: SessionEntry) -> dict[str, Any]:
        return {
            "tokens": len(entry.token_ids),
            "computed_tokens": entry.num_computed,
            "namespace": entry.namespace,
            "is_active": entry.active_seq in self._core.sequences,
            "is_durable": entry.is_durable,
        }

    # ------------------------------------------------------------------ reading bytes without a lease
    def read_host_block(self, key: bytes, group: int = 0) -> bytes | None:
        """A copy of a block's bytes from the host tier, or None; takes no pin and checks the generation after (rule 11)."""
        from .rules import Rule

        held = self._core.groups[group]
        with self._core.locked():
            block = held.directory.by_key.get(key)
            slot = NOWHERE if block is None else int(held.directory.host_slot[block])
            if slot < 0 or held.host.state[slot] != SlotState.VALID:
                return None
            generation = held.host.generation[slot]
        copied: list[bytes] = []
        self._core.backend.read_io.submit(lambda: copied.append(_bytes_of_slot(held, slot))).wait(30.0)
        with self._core.lock:
            same = held.host.generation[slot] == generation and held.host.state[slot] == SlotState.VALID
        if copied and (same or not self._core.rules.holds(Rule.READER_CHECKS_GENERATION)):
            return copied[0]
        return None

    # ------------------------------------------------------------------ looking after itself
    def status(self) -> dict[str, Any]:
        """State and counters as plain JSON-able values; see status.py for the fields."""
        with self._core.locked():
            return pager_status(self._core)

    def note_request(self, seq: int, **told: Any) -> None:
        """Remember an answered request for inspectors, while its sequence is still open; see inspection/requests.py."""
        requests.note(self._core, seq, **told)

    def watch_requests(self, listener: OnAnswered | None) -> None:
        """Tell somebody of every answered request, on the engine's thread; one listener, None for nobody."""
        self._core.observer.on_answered = listener

    def poll(self) -> None:
        """Apply finished copies and keep the watermarks; the background thread does this by itself."""
        with self._core.lock:
            self._core.advance()
            self._prefetcher.tick()

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until no copy is in flight. False on timeout."""
        return self._core.wait_until(lambda: not self._core.in_flight(), timeout_s) or not self._core.in_flight()

    def check_integrity(self) -> None:
        """Raises InvariantError at the first contradiction in the books."""
        self._core.check_integrity()

    def abandon_transfers(self, timeout_s: float = 30.0) -> None:
        """Give up every copy in flight: drain the streams, then count half-done ones as never begun (rules 8, 9)."""
        core = self._core
        with core.lock:
            for stream in (core.backend.promote, core.backend.demote):
                if not stream.synchronize(timeout_s):
                    raise Busy(f"abandon: stream {stream.name} did not drain in {timeout_s} s", retry_after_s=1.0)
            for group in core.groups:
                for move in group.moves:
                    if not move.event.wait(timeout_s):  # of a daemon that is gone without a word, say
                        raise Busy(f"abandon: a copy did not end in {timeout_s} s", retry_after_s=1.0)
                group.abandon(drained=True)

    def close(self, timeout_s: float = 60.0) -> None:
        """End the pager. Parked sessions stay in the store; everything else was a cache."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop.set()
        self._wake.set()
        if self._status_server is not None:
            self._status_server.close()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._core.memory.close()
        if self._remote is not None:
            self._remote.close(timeout_s)
        is_drained = self.drain(timeout_s)
        if self._remote is not None:
            self._remote.leave(is_drained=is_drained)
        if self._core.nvme is not None:
            self._core.nvme.close()
        self._core.backend.close(timeout_s)

    def __enter__(self) -> Pager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Threads of a real pager; the simulated backend runs without, so that a seed decides everything."""
        if self._core.backend.name == "simulated":
            return
        if self._core.config.host_prefault:
            self._core.memory.start_prefault()
        self._core.backend.on_progress = self._wake.set
        self._thread = threading.Thread(target=self._run, name="kvtier-pager", daemon=True)
        self._thread.start()
        path = self._core.config.status_socket
        if path is None and self._core.config.nvme_path is not None:
            path = f"{self._core.config.nvme_path}/status.sock"
        if path is not None:
            self._status_server = InspectionService.start(path, self._core)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(_IDLE_LOOK_S)
            self._wake.clear()
            with self._core.lock:
                self._core.advance()
                self._prefetcher.tick()


def open_pager(
    address: str | None,
    layouts: Sequence[KVLayout],
    config: PagerConfig,
    *,
    model_fingerprint: str,
    about: Mapping[str, Any],
    clock: Callable[[], float] = time.monotonic,
) -> Pager:
    """A pager of this process's own, or where an address is given one over a daemon's memory."""
    if address is None:
        return Pager.open(layouts, config, model_fingerprint=model_fingerprint, about=about, clock=clock)
    return Pager.connect(address, layouts, config, model_fingerprint=model_fingerprint, about=about, clock=clock)


def _bytes_of_slot(group: BlockGroup, slot: int) -> bytes:
    """A block in a host slot, in full precision."""
    if group.forms.packed is not None:
        return group.forms.packed.read(np.array([slot])).tobytes()
    row: bytes = group.slab.rows[group.slab.place(np.array([slot]))[0]].tobytes()
    return row


def _layouts(layout: KVLayout | Sequence[KVLayout]) -> tuple[KVLayout, ...]:
    layouts = (layout,) if isinstance(layout, KVLayout) else tuple(layout)
    if not layouts or len({g.block_size for g in layouts}) != 1:
        raise ConfigError(f"layout: need at least one layer group, all of one block_size; got {layouts}")
    return layouts


__all__ = ["Match", "Pager", "ParkedSession", "Span", "open_pager", "stored_block_size"]
