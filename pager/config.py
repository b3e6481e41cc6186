"""Settings of a pager: one frozen dataclass, read from arguments, environment, a TOML file or defaults, in that order.

Every refusal names the setting, its value and what would be accepted. Nothing here touches a disk or a device.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..tiers.errors import ConfigError
from ..tiers.formats import FormatText, is_policy, parse_policy
from ..tiers.host import check_huge_pages
from ..tiers.layout import FULL, format_bytes, parse_bytes
from ..tiers.numa import check_numa
from ..tiers.nvme.codecs import NONE, check_codec, check_mix
from ..tiers.nvme.commit import check_durability
from ..tiers.nvme.disk_settings import MAX_IO_DEPTH, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, settings_for
from ..tiers.nvme.sealing import MIN_SECRET_BYTES
from ..tiers.owners import owner_tag
from .policies.registry import check_policy
from .quota import NamespaceQuota, Size, check_floors, parse_quota
from .settings import read_settings

# of a file that pagerd reads too, see daemon/settings.py (a test compares)
DAEMON_SETTINGS = (
    *(
        "socket",
        "socket_mode",
        "listen",
        "tls_cert",
        "tls_key",
        "metrics",
        "max_models",
        "slab_uids",
        "allow_ipc",
        "root_secret_file",
    ),
    *("log_format", "log_level", "limits", "namespaces"),
)
TRANSFERS = ("client", "ipc")
MEASURED = "auto"


@dataclass(frozen=True, slots=True)
class PagerConfig:
    """How much memory each tier may take, where the cold tier lives, and who leaves first.

    Units: sizes are bytes or text such as "8GiB"; marks are shares of the device pool; times end in _s.
    """

    device_bytes: Size
    host_bytes: Size = 0
    nvme_path: str | os.PathLike[str] | None = None
    nvme_bytes: Size | None = None  # None: as much as the disk gives
    durability: str = "batch"  # none, batch (group commit every 64 MiB or 0.1 s) or always
    # requests in flight on the disk, each way, and the size of a new store's files; auto: as `kvtier doctor --tune` measured
    # on that disk, else 12 and 32 MiB
    nvme_queue_depth: int | str = MEASURED
    nvme_segment_bytes: Size = MEASURED
    nvme_write_bytes_per_s: Size | None = None  # budgets for cache; what is parked or persisted is always written
    nvme_write_bytes_per_day: Size | None = None
    # one codec for all layer groups, one each, or by the group's name; None: a store's own, and none in a new one
    nvme_codec: str | Sequence[str] | Mapping[str, str] | None = None
    # formats: "full" (or its dtype, "bf16"), or fewer bits, such as "int8" or "int4/128; layers 0-1: bf16", for all layer
    # groups or by the group's name; the store has what the host tier has unless told. In the device tier only an Engine or
    # a PrefixCache packs pages, an Engine also by heads: "int4; heads 0: bf16"; the tiers below then hold the same bytes
    device: FormatText = FULL
    residual: int = 0  # newest tokens, beside the block being filled, that packed pages have in full precision too
    host: FormatText = FULL
    nvme: FormatText | None = None
    policy: str = "auto"
    window: int | None = None  # tokens, for policy "sliding_window"
    sinks: int = 4  # tokens, for policy "sliding_window"
    backend: str = "auto"  # auto | cpu | cuda
    prefetch: bool = True  # bring up what sessions will need that are likely to go on soon, where there is room
    low_watermark: float = 0.06  # below this share of free or clean pages, write-back starts
    high_watermark: float = 0.12  # and goes on up to this share
    staging_bytes: Size | None = None  # part of device_bytes for streaming; None: an eighth, as far as the rings use it
    selection_bytes: Size = 0  # part of device_bytes for selected attention: key summaries and picked slices
    require_pinned: bool = False
    host_prefault: bool = True  # fault the host tier in, in the background, as far as memory limits allow
    host_huge_pages: str = "auto"  # auto (transparent ones) | off | reserved (from vm.nr_hugepages)
    host_numa: str | int = "auto"  # auto (near the device, else near our CPUs) | off | interleave | split | node
    status_socket: str | None = (
        None  # Unix socket for pager-inspect; None: <nvme_path>/status.sock when there is a store
    )
    pager_token_file: str | None = None  # who we are to a daemon that asks: a file of mode 0600 that holds our token
    pager_ca: str | None = None  # what the certificate of a daemon at tls:// is checked against; None: the system's
    transfer: str = "client"  # who copies between our pages and a daemon's memory: client | ipc (the daemon)
    namespace_secrets: Mapping[str, str] = field(default_factory=dict)  # namespace -> hex secret
    # namespace -> bytes of nvme that it may hold, or a table of what quota.NamespaceQuota names
    namespace_quotas: Mapping[str, Size | Mapping[str, Size]] = field(default_factory=dict)

    @property
    def device_size(self) -> int:
        return parse_bytes(self.device_bytes, name="device_bytes")

    @property
    def staging_size(self) -> int | None:
        """None: a share of the device tier."""
        return None if self.staging_bytes is None else parse_bytes(self.staging_bytes, name="staging_bytes")

    @property
    def selection_size(self) -> int:
        return parse_bytes(self.selection_bytes, name="selection_bytes")

    @property
    def host_size(self) -> int:
        return parse_bytes(self.host_bytes, name="host_bytes")

    @property
    def nvme_size(self) -> int | None:
        return None if self.nvme_bytes is None else parse_bytes(self.nvme_bytes, name="nvme_bytes")

    @property
    def nvme_write_size(self) -> int | None:
        return _budget(self.nvme_write_bytes_per_s, "nvme_write_bytes_per_s")

    @property
    def nvme_day_size(self) -> int | None:
        return _budget(self.nvme_write_bytes_per_day, "nvme_write_bytes_per_day")

    def codecs(self, groups: Sequence[str]) -> list[str] | None:
        """A codec for each of these layer groups, by name; None when the store may choose. Raises ConfigError."""
        asked = self._asked_codecs()
        if asked is None:
            return None
        if isinstance(asked, str):
            return [asked] * len(groups)
        if isinstance(asked, Mapping):
            for name in asked:
                if name not in groups:
                    raise ConfigError(
                        f"nvme_codec={self.nvme_codec!r}: there is no layer group {name!r}; this model has "
                        f"{', '.join(groups)}"
                    )
            chosen = [asked.get(name, NONE) for name in groups]
            check_mix(chosen, where="nvme_codec")
            return chosen
        if len(asked) != len(groups):
            raise ConfigError(
                f"nvme_codec={self.nvme_codec!r} names {len(asked)} codecs; this model has {len(groups)} layer groups "
                f"({', '.join(groups)}): give one each, or one for all"
            )
        check_mix(asked, where="nvme_codec")
        return list(asked)

    def _asked_codecs(self) -> str | Sequence[str] | Mapping[str, str] | None:
        """The setting with text such as "zstd,none" or "full=zstd,window=none" taken apart. Raises ConfigError."""
        asked = self.nvme_codec
        if isinstance(asked, str) and ("," in asked or "=" in asked):
            parts = [part.strip() for part in asked.split(",")]
            pairs = [part.partition("=") for part in parts]
            is_named = [bool(equals) for _, equals, _ in pairs]
            if any(is_named) and not all(is_named):
                raise ConfigError(f"nvme_codec={asked!r} mixes codecs with and without a layer group's name")
            asked = {name.strip(): codec.strip() for name, _, codec in pairs} if any(is_named) else parts
        if not isinstance(asked, str | Mapping | Sequence | None):
            raise ConfigError(f"nvme_codec={asked!r}: give a codec, a list of one per layer group, or a table by name")
        names = [asked] if isinstance(asked, str) else asked.values() if isinstance(asked, Mapping) else asked or []
        for name in names:
            check_codec(name, where="nvme_codec")
        return asked

    def _formats_of(self, setting: str) -> list[str]:
        """The texts of `device`, `host` or `nvme`: one, or one per layer group that is named."""
        asked: FormatText | None = getattr(self, setting)
        texts = asked.values() if isinstance(asked, Mapping) else (asked,)
        return [FULL if text is None else text for text in texts]

    def check_sealable(self, namespace: str) -> None:
        """Raises ConfigError for a namespace whose blocks could not be encrypted."""
        if len(self.secret(namespace)) < MIN_SECRET_BYTES:
            raise ConfigError(
                f"the store is encrypted and namespace {namespace!r} has no secret of at least {MIN_SECRET_BYTES} bytes: give "
                f"one in namespace_secrets[{namespace!r}]"
            )

    def secret(self, namespace: str) -> bytes:
        return bytes.fromhex(self.namespace_secrets.get(namespace, ""))

    def secrets_by_owner(self) -> dict[int, bytes]:
        return {owner_tag(name): self.secret(name) for name in self.namespace_secrets}

    def quota(self, namespace: str) -> NamespaceQuota:
        return parse_quota(self.namespace_quotas[namespace], name=f"namespace_quotas[{namespace!r}]")

    def quotas(self) -> dict[str, NamespaceQuota]:
        return {namespace: self.quota(namespace) for namespace in self.namespace_quotas}

    def queue_depth(self) -> int:
        """Requests in flight on the disk; looks at the disk's own settings where it may."""
        if isinstance(self.nvme_queue_depth, int):
            return self.nvme_queue_depth
        return settings_for(self.nvme_path).queue_depth

    def segment_size(self) -> int:
        """Bytes per segment of a new store; looks likewise."""
        if self.nvme_segment_bytes == MEASURED:
            return settings_for(self.nvme_path).segment_bytes
        return parse_bytes(self.nvme_segment_bytes, name="nvme_segment_bytes")

    def _check_disk_settings(self) -> None:
        depth, size = self.nvme_queue_depth, self.nvme_segment_bytes
        if depth != MEASURED and (type(depth) is not int or not 1 <= depth <= MAX_IO_DEPTH):
            raise ConfigError(
                f"nvme_queue_depth={depth!r}: need 1 to {MAX_IO_DEPTH} requests in flight, or {MEASURED!r}"
            )
        if size == MEASURED:
            return
        if not MIN_SEGMENT_BYTES <= parse_bytes(size, name="nvme_segment_bytes") <= MAX_SEGMENT_BYTES:
            raise ConfigError(
                f"nvme_segment_bytes={size!r}: need {format_bytes(MIN_SEGMENT_BYTES)} to "
                f"{format_bytes(MAX_SEGMENT_BYTES)}, or {MEASURED!r}"
            )

    def validate(self) -> PagerConfig:
        """Check everything that can be checked without a disk or a device. Raises ConfigError."""
        if self.device_size <= 0:
            raise ConfigError(
                f"device_bytes={self.device_bytes!r}: the device tier needs room for at least a few blocks"
            )
        self.check_tiers()
        return self

    def check_tiers(self) -> None:
        """All but the device tier, which a daemon has not. Raises ConfigError."""
        if self.host_size < 0 or (self.nvme_size is not None and self.nvme_size < 0):
            raise ConfigError("host_bytes and nvme_bytes must not be negative")
        if "\0" in f"{self.nvme_path}{self.status_socket}":
            raise ConfigError(
                f"nvme_path={self.nvme_path!r}, status_socket={self.status_socket!r}: a zero character in a path"
            )
        if self.nvme_path is not None and self.host_size == 0:
            raise ConfigError(
                f"nvme_path={str(self.nvme_path)!r} with host_bytes=0: blocks pass through the host tier on their way to "
                "disk; give it at least a few blocks, e.g. host_bytes='64MiB'"
            )
        if self._asked_codecs() is not None and self.nvme_path is None:
            raise ConfigError(f"nvme_codec={self.nvme_codec!r} without nvme_path: say where the store is")
        check_durability(self.durability)
        for setting in ("device", "host", "nvme"):
            for text in self._formats_of(setting):
                parse_policy(text, name=setting)
        if self.host_size == 0 and any(map(is_policy, self._formats_of("host"))):
            raise ConfigError(
                f"host={self.host!r} with host_bytes=0: there is no host tier to keep blocks in fewer bits; give it room, "
                "e.g. host_bytes='1GiB', or leave host out"
            )
        if self.nvme is not None and self.nvme_path is None:
            raise ConfigError(f"nvme={self.nvme!r} without nvme_path: say where the store is")
        if self.nvme_path is None and self.nvme_bytes is not None:
            raise ConfigError(f"nvme_bytes={self.nvme_bytes!r} without nvme_path: say where the store is")
        for name in ("nvme_write_bytes_per_s", "nvme_write_bytes_per_day"):
            if getattr(self, name) is not None and self.nvme_path is None:
                raise ConfigError(f"{name}={getattr(self, name)!r} without nvme_path: say where the store is")
        _ = self.nvme_write_size, self.nvme_day_size  # refused when they are read
        if not isinstance(self.prefetch, bool):
            raise ConfigError(f"prefetch={self.prefetch!r}: choose true or false")
        if not 0.0 <= self.low_watermark <= self.high_watermark < 1.0:
            raise ConfigError(
                f"low_watermark={self.low_watermark}, high_watermark={self.high_watermark}: "
                "need 0 <= low_watermark <= high_watermark < 1"
            )
        check_policy(self.policy, self.window)
        if isinstance(self.residual, bool) or not isinstance(self.residual, int) or self.residual < 0:
            raise ConfigError(f"residual={self.residual!r}: a number of tokens, not negative")
        if self.sinks < 0:
            raise ConfigError(f"sinks={self.sinks}: the number of sink tokens must not be negative")
        if self.backend not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"backend={self.backend!r} is unknown; choose auto, cpu or cuda")
        if self.transfer not in TRANSFERS:
            raise ConfigError(f"transfer={self.transfer!r} is unknown; choose {' or '.join(TRANSFERS)}")
        for setting in ("namespace_quotas", "namespace_secrets"):
            if not isinstance(getattr(self, setting), Mapping):
                raise ConfigError(f"{setting}={getattr(self, setting)!r}: give a mapping from namespace to value")
        self._check_disk_settings()
        if not isinstance(self.host_prefault, bool):
            raise ConfigError(f"host_prefault={self.host_prefault!r}: choose true or false")
        check_huge_pages(self.host_huge_pages)
        check_numa(self.host_numa)
        for name in self.namespace_quotas:
            if self.quota(check_namespace(name)).is_of_nvme and self.nvme_path is None:
                raise ConfigError(f"namespace_quotas[{name!r}] is of the nvme tier; say where it is with nvme_path")
        check_floors(self.quotas(), {"host": self.host_size, "nvme": self.nvme_size})
        check_tags([check_namespace(name) for name in self.namespace_secrets], where="namespace_secrets")
        for name, secret in self.namespace_secrets.items():
            check_namespace(name)
            try:
                too_long = len(bytes.fromhex(secret)) > 64
            except (TypeError, ValueError):
                raise ConfigError(f"namespace_secrets[{name!r}] is not hexadecimal text") from None
            if too_long:
                raise ConfigError(f"namespace_secrets[{name!r}] is longer than 64 bytes")


def _budget(value: Size | None, name: str) -> int | None:
    size = None if value is None else parse_bytes(value, name=name)
    if size is not None and size <= 0:
        raise ConfigError(f"{name}={value!r}: give more than 0 bytes, or leave it out for no limit")
    return size


def check_tags(names: Collection[str], *, where: str) -> None:
    """Raises ConfigError where two names would be one to the blocks that are tagged with them."""
    if len({owner_tag(name) for name in names}) < len(names):
        raise ConfigError(f"{where}: two names have one 32-bit tag; rename one of them")


def check_namespace(name: str) -> str:
    """The name of a namespace, as it is. Raises: ConfigError."""
    if not isinstance(name, str) or not name or len(name) > 64 or not all(c.isalnum() or c in "_-" for c in name):
        raise ConfigError(f"namespace={name!r}: use 1 to 64 letters, digits, '_' or '-'")
    return name


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> PagerConfig:
    """Build a PagerConfig: override > environment (KVTIER_HOST_BYTES) > TOML file > `defaults` > default.

    The file may be one that `pagerd` reads too: what is the daemon's alone is left to it.
    Raises: ConfigError for an unreadable file, an unknown key, a value of the wrong type, or a setting that is refused.
    """
    values = {"device_bytes": "", **(defaults or {})}
    config = read_settings(PagerConfig, path, env=env, overrides=overrides, also_known=DAEMON_SETTINGS, defaults=values)
    if config.device_bytes == "":
        raise ConfigError(
            "device_bytes is missing: say how much memory the device tier may take, e.g. device_bytes='2GiB'"
        )
    return config.validate()


def with_changes(config: PagerConfig, **changes: Any) -> PagerConfig:
    """A copy with some settings changed, checked again."""
    return replace(config, **changes).validate()
