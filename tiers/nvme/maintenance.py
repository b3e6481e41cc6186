"""Looking after a store that nobody has open: check, repair, give disk back, copy blocks to another store.

All of it takes the store's lock and works through the same checked reads and writes as the pager. Progress is reported
as (done, total) blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..cpu import CpuBackend
from ..errors import ConfigError, StoreMismatchError, TierUnavailableError
from ..streams import IntArray
from .codecs import is_lossy
from .identity import MANIFEST_FILE, StoreIdentity, read_identity, repair_metadata, segment_path, stored_layouts
from .manifest import replay
from .resting import RestingTier
from .sealing import MIN_SECRET_BYTES, RecordSealer, is_sealed
from .store import NvmeTier

Progress = Callable[[int, int], None]
BATCH_BYTES = 32 << 20
Secrets = Mapping[int, bytes]  # of namespaces, by owner tag
_NO_SECRETS: Secrets = {}


@dataclass(slots=True)
class Report:
    """What was found and done. `bad_blocks`: listed, but their bytes, key or generation are not what was listed."""

    blocks: int = 0
    bad_blocks: int = 0
    dropped_blocks: int = 0
    copied_blocks: int = 0
    known_blocks: int = 0  # the target of a copy had them already
    sessions: int = 0  # of a copy: those that it put there
    kept_sessions: list[str] = field(default_factory=list)  # the target of a copy had these, and has its own still
    journal_gaps: int = 0  # damaged places; what was recorded there is lost
    torn_journal_bytes: int = 0  # at its end, as a crash leaves them
    torn_indexes: int = 0  # of segments: stock readers refuse those, blocks are as they were
    freed_bytes: int = 0
    repaired_metadata: int = 0  # 1 when Zarr metadata had to be written anew

    @property
    def is_damaged(self) -> bool:
        return bool(self.bad_blocks or self.journal_gaps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stored_identity(path: Path) -> StoreIdentity:
    """Raises ConfigError when there is no readable store."""
    stored = read_identity(path)
    return StoreIdentity(str(stored.get("model_fingerprint", "")), stored_layouts(path, stored))


def check(path: Path, progress: Progress, *, repair: bool = False, secrets: Secrets = _NO_SECRETS) -> Report:
    """Read every listed block; nothing is changed. With `repair`, what is bad leaves the listing, journal, indexes and
    metadata are written anew.

    Raises ConfigError, before anything is called bad, for blocks that are encrypted under a secret that is not given.
    """
    report = Report()
    if not repair:
        with _looked_at(path, secrets) as resting:
            _read_whole(resting, report, progress, secrets)
            _tell_journal(report, resting)
            report.torn_indexes = resting.torn_indexes
        return report
    report.repaired_metadata = int(repair_metadata(path, stored_identity(path)))
    with _opened(path, secrets=secrets) as (tier, _):
        for group, bad in _read_whole(tier, report, progress, secrets):
            tier.quarantine(group, bad)
            report.dropped_blocks += len(bad)
        tier.rewrite_indexes()
        _tell_journal(report, tier)
        report.torn_indexes = tier.status()["torn_indexes"]
    return report


def collect(path: Path, progress: Progress) -> Report:
    """Remove segment files that hold no block, the disk under free slots of sparse ones, and history from the journal."""
    report = Report()
    with _opened(path) as (tier, _):
        before = _disk_bytes(path)
        for group, layout in enumerate(stored_identity(path).layouts):
            slots = tier.recovered()[group][0]
            report.blocks += len(slots)
            used = set((slots // tier.geometry(group).slots_per_segment).tolist())
            files = sorted(segment_path(path, layout, group, 0).parent.glob("c.*"))
            for done, file in enumerate(files):
                if int(file.name.split(".")[1]) not in used:
                    tier.drop_segment(group, int(file.name.split(".")[1]))
                    file.unlink()
                progress(done + 1, len(files))
            tier.punch_unused(group)
        tier.flush()
        tier.shrink_journal()
        report.freed_bytes = before - _disk_bytes(path)
    return report


def copy(
    source: Path,
    target: Path,
    progress: Progress,
    *,
    codec: str | None = None,
    secrets: Secrets = _NO_SECRETS,
    replace: bool = False,
) -> Report:
    """Copy blocks and sessions from one store into another of the same model, which is made where there is none.

    A new target is stored as the source is, or under `codec`; one that exists keeps its own. So it does with sessions whose
    ids it has already, since which is newer is not told, unless `replace`.
    Raises: StoreMismatchError when the two are of different models; ConfigError when the target has no room;
    TierUnavailableError when its disk refuses a block.
    """
    identity, is_new = stored_identity(source), not (target / "store.json").exists()
    if not is_new and stored_identity(target) != identity:
        raise StoreMismatchError(f"store {target} belongs to another model or layout than {source}")
    report = Report()
    with _opened(source, secrets=secrets) as (origin, _):
        _require_secrets(origin, secrets)
        listed = origin.recovered()
        total = sum(len(slots) for slots, _ in listed)
        codecs = [codec] * len(listed) if codec is not None else origin.codecs if is_new else None
        with _opened(target, identity, [len(slots) for slots, _ in listed], codecs, secrets) as (into, _):
            _require_secrets(into, secrets, of=origin)
            _require_no_loss(origin, into)
            known = [{stamp.tobytes() for stamp in stamps["key"]} for _, stamps in into.recovered()]
            for group, (slots, stamps) in enumerate(listed):
                keys = [stamp.tobytes() for stamp in stamps["key"]]
                new = np.array([key not in known[group] for key in keys], bool)
                report.known_blocks += int((~new).sum())
                for part, rows, ok in _read_all(origin, group, slots[new]):
                    report.blocks += len(part)
                    report.bad_blocks += int((~ok).sum())
                    good = np.flatnonzero(ok)
                    places = into.allocate(group, len(good))
                    ticket = into.write(group, places, rows, good, origin.stamps(group, part)[good])
                    ticket.event.wait()
                    if ticket.event.error is not None or not ticket.ok.all():
                        why = into.last_write_error or repr(ticket.event.error)
                        raise TierUnavailableError(
                            f"store {target} takes no more blocks: {why:.200}; the copy is not whole"
                        )
                    report.copied_blocks += len(good)
                    progress(report.blocks, total)
            had = into.sessions()
            for session_id, record in _records(origin, secrets):
                name, as_there = _as_in(into, session_id, record, secrets)
                if name in had and not replace:
                    report.kept_sessions.append(session_id)
                    continue
                into.put_session(name, as_there)
                report.sessions += 1
            into.flush()
    return report


# ---------------------------------------------------------------------- inside
@contextmanager
def _opened(
    path: Path,
    identity: StoreIdentity | None = None,
    more_slots: list[int] | None = None,
    codecs: list[str] | None = None,
    secrets: Secrets = _NO_SECRETS,
) -> Iterator[tuple[NvmeTier, CpuBackend]]:
    """The store with room for what it lists, and for `more_slots` besides."""
    if identity is None or (path / "store.json").exists():
        identity = stored_identity(path)
    backend = CpuBackend()
    try:
        listing = replay(path / MANIFEST_FILE).listing
        listed = [listing.group(i).slots() for i in range(len(identity.layouts))]
        held = [int(slots.max()) + 1 if len(slots) else 0 for slots in listed]
        room = [a + b for a, b in zip(held, more_slots or [0] * len(held), strict=True)]
        tier = NvmeTier.open(path, identity, num_slots=room, backend=backend, codecs=codecs, secrets=secrets)
        try:
            yield tier, backend
        finally:
            tier.close()
    finally:
        backend.close(10.0)


@contextmanager
def _looked_at(path: Path, secrets: Secrets) -> Iterator[RestingTier]:
    """The store as it lies there; nothing of it is changed."""
    backend = CpuBackend()
    try:
        resting = RestingTier(path, stored_identity(path), backend, secrets)
        try:
            yield resting
        finally:
            resting.close()
    finally:
        backend.close(10.0)


def _read_whole(
    tier: NvmeTier | RestingTier, report: Report, progress: Progress, secrets: Secrets
) -> list[tuple[int, IntArray]]:
    """Read all that is listed. Slots of bad blocks, by layer group."""
    report.sessions = len(tier.sessions())
    listed = tier.recovered()
    _require_secrets(tier, secrets)
    total = sum(len(slots) for slots, _ in listed)
    bad: list[tuple[int, IntArray]] = []
    for group, (slots, _) in enumerate(listed):
        for part, _, ok in _read_all(tier, group, slots):
            report.blocks += len(part)
            report.bad_blocks += int((~ok).sum())
            if not ok.all():
                bad.append((group, part[~ok]))
            progress(report.blocks, total)
    return bad


def _tell_journal(report: Report, tier: NvmeTier | RestingTier) -> None:
    report.journal_gaps, report.torn_journal_bytes = tier.journal_gaps, tier.torn_journal_bytes


def _require_secrets(tier: NvmeTier | RestingTier, secrets: Secrets, *, of: NvmeTier | None = None) -> None:
    """Whoever's blocks are in `of` (or here) must be able to open or seal them here. Raises ConfigError."""
    if not tier.is_encrypted:
        return
    owners = {owner for _, stamps in (of or tier).recovered() for owner in np.unique(stamps["owner"]).tolist()}
    lacking = sorted(owner for owner in owners if len(secrets.get(owner, b"")) < MIN_SECRET_BYTES)
    if lacking:
        raise ConfigError(
            f"an encrypted store, and the secrets of {len(lacking)} namespaces are not given (tags "
            f"{', '.join(f'{owner:#010x}' for owner in lacking[:4])}): name them in a file for --config, or in the environment"
        )


def _require_no_loss(origin: NvmeTier, into: NvmeTier) -> None:
    """Rounded blocks must not pass for what they were, nor be rounded again. Raises ConfigError."""
    for has, wanted in zip(origin.codecs, into.codecs, strict=True):
        if has != wanted and is_lossy(has):
            raise ConfigError(
                f"the store's blocks are in {has!r} and cannot be had as {wanted!r} any more: copy them without --codec, or "
                "compute them again"
            )


def _records(tier: NvmeTier, secrets: Secrets) -> Iterator[tuple[str, dict[str, Any]]]:
    """Session records by id, opened; those that do not open are left out."""
    for name, record in tier.sessions().items():
        opened = RecordSealer(secrets).unwrap(name, record) if is_sealed(record) else (name, record)
        if opened is not None:
            yield opened


def _as_in(tier: NvmeTier, session_id: str, record: dict[str, Any], secrets: Secrets) -> tuple[str, dict[str, Any]]:
    return RecordSealer(secrets).wrap(session_id, record) if tier.is_encrypted else (session_id, record)


def _read_all(tier: NvmeTier | RestingTier, group: int, slots: IntArray) -> Iterator[tuple[IntArray, Any, Any]]:
    """Batches of slots, their rows, and which of them are good. Rows are used again for the next batch."""
    size = tier.block_bytes(group)
    batch = max(1, BATCH_BYTES // size)
    rows = tier.spare_rows(group, min(batch, max(1, len(slots))))
    for start in range(0, len(slots), batch):
        part = slots[start : start + batch]
        ticket = tier.read(group, part, rows, np.arange(len(part)), tier.stamps(group, part))
        ticket.event.wait()
        if ticket.event.error is not None:  # nothing is known of these blocks, so none of them is bad
            raise ticket.event.error
        yield part, rows, ticket.ok


def _disk_bytes(path: Path) -> int:
    return sum(os.stat(file).st_blocks * 512 for file in path.rglob("*") if file.is_file())
