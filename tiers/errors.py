"""Every error of ours, and who should act on it.

KvTierError                      every error of ours; carries .code, stable on the wire
├─ ConfigError                   operator: refuse to start; names key, value, allowed range
│  ├─ UnsupportedModelError
│  ├─ StoreMismatchError         the store holds another model, layout or format
│  ├─ StoreLockedError           another live process has the store
│  └─ UnknownSessionError        no session of that id in that namespace
├─ Busy                          engine: retry later; carries .retry_after_s
│  ├─ TierFullError              no slot and no legal victim
│  └─ QueueFullError
├─ BlockMissError                engine: recompute; never shown to a user
│  └─ StaleLeaseError
├─ CorruptBlockError             pager: drop the copy, count it, recompute; never serve it
├─ TierUnavailableError          pager: stop using the tier, keep serving from the rest
├─ UnpackableError               pager: keep these blocks in full precision
├─ ProtocolError                 peer: version or frame is wrong; close the connection
└─ InvariantError                us: a bug; state is suspect
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class KvTierError(Exception):
    """Base of every error of ours."""

    code = "error"


class ConfigError(KvTierError):
    code = "config"


class UnsupportedModelError(ConfigError):
    code = "unsupported_model"


class StoreMismatchError(ConfigError):
    code = "store_mismatch"


class StoreLockedError(ConfigError):
    code = "store_locked"


class UnknownSessionError(ConfigError):
    code = "unknown_session"


class Busy(KvTierError):
    """Try again after `retry_after_s` seconds."""

    code = "busy"

    def __init__(self, message: str, *, retry_after_s: float = 0.1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TierFullError(Busy):
    code = "tier_full"


class QueueFullError(Busy):
    code = "queue_full"


class BlockMissError(KvTierError):
    """A block is in no tier: `num_valid` tokens of sequence `seq` still count, compute from there."""

    code = "block_miss"

    def __init__(self, message: str, *, seq: int = -1, num_valid: int = 0) -> None:
        super().__init__(message)
        self.seq = seq
        self.num_valid = num_valid


class StaleLeaseError(BlockMissError):
    code = "stale_lease"


class CorruptBlockError(KvTierError):
    code = "corrupt_block"


class UnpackableError(KvTierError):
    """A format cannot hold the values of some blocks; `rows` are where they were read from."""

    code = "unpackable"

    def __init__(self, rows: npt.NDArray[np.int64], reason: str) -> None:
        super().__init__(f"{len(rows)} blocks cannot be packed: {reason}")
        self.rows = rows


class TierUnavailableError(KvTierError):
    code = "tier_unavailable"


class SessionChangedError(ConfigError):
    """Another process has gone on with it: what we have of it is not what is stored."""

    code = "session_changed"


class ProtocolError(KvTierError):
    code = "protocol"


class InvariantError(KvTierError):
    code = "invariant"
