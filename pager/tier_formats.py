"""Which formats the tiers of a pager keep its blocks in: from the configuration and the layouts to one per layer group.

The host tier keeps what it is told, the store what it is told or else what the host tier has. What the device tier keeps is
part of the layouts, because an engine packs its pages itself: to everybody below they are blocks like any other, with
keys of their own. Guards: a store of rounded blocks is opened only by who asks for exactly that rounding, so no block that
was rounded is ever handed out as exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tiers.errors import ConfigError, StoreMismatchError
from ..tiers.formats import (
    BlockFormat,
    FormatText,
    block_formats,
    check_order,
    is_policy,
    packed_layouts,
    page_format,
    unpacked_layouts,
)
from ..tiers.layout import FULL, KVLayout
from ..tiers.nvme.codecs import NONE, is_lossy
from ..tiers.parts import GroupPart, split_groups
from .config import PagerConfig, with_changes

SPLIT = "split"  # the codec that takes numbers apart


def split_device(config: PagerConfig, layouts: Sequence[KVLayout]) -> tuple[PagerConfig, list[list[GroupPart]]]:
    """How layer groups are cut so that the device tier keeps each in one format, and the settings of those groups.

    Settings that number layers or name groups go on meaning what they meant. Raises ConfigError for what cannot be.
    """
    cut = split_groups(config.device, layouts, name="device")
    if all(len(parts) == 1 for parts in cut):
        return config, cut

    def below(text: FormatText, name: str) -> dict[str, str]:
        formats = block_formats(text, layouts, name=name)
        return {part.name: part.text_below(fmt) for fmt, parts in zip(formats, cut, strict=True) for part in parts}

    codecs = config.codecs([layout.name for layout in layouts])
    changes = dict(
        device={part.name: part.kind.text for parts in cut for part in parts},
        host=below(config.host, "host"),
        nvme=None if config.nvme is None else below(config.nvme, "nvme"),
        nvme_codec=codecs and {part.name: codec for codec, parts in zip(codecs, cut, strict=True) for part in parts},
    )
    return with_changes(config, **changes), cut


def device_layouts(config: PagerConfig, layouts: Sequence[KVLayout]) -> list[KVLayout]:
    """Layouts of a pager whose owner packs pages as config.device says. Raises ConfigError for what cannot be."""
    made = packed_layouts(config.device, layouts, name="device", residual=config.residual)
    if config.residual and not any(layout.is_packed for layout in made):
        raise ConfigError(
            f"residual={config.residual} with device={config.device!r}: no pages are packed, and all is in full precision; "
            "leave residual out, or give device a format such as 'int4'"
        )
    if config.selection_size and any(layout.is_packed and page_format(layout).is_hack for layout in made):
        raise ConfigError(
            f"device={config.device!r} with selection_bytes={config.selection_bytes!r}: attention on these pages rounds q too, "
            "so the bound on what is left out would not hold; use int8, fp8, int4 or int2, or leave selection_bytes out"
        )
    return made


def host_formats(config: PagerConfig, layouts: Sequence[KVLayout]) -> list[BlockFormat]:
    """How the host tier keeps the blocks of each layer group. Raises ConfigError for what does not fit them."""
    _check_device(config, layouts)
    return _below_device(config.host, layouts, name="host")


def nvme_formats(config: PagerConfig, layouts: Sequence[KVLayout]) -> list[BlockFormat]:
    """How the store keeps them. Raises ConfigError, also where it would keep more bits than the tier above."""
    upper = host_formats(config, layouts)
    lower = upper if config.nvme is None else _below_device(config.nvme, layouts, name="nvme")
    for above, below in zip(upper, lower, strict=True):
        check_order(above, below, names=("host", "nvme"))
    return lower


def roundings(config: PagerConfig, layouts: Sequence[KVLayout]) -> list[list[BlockFormat]]:
    """For each layer group the formats through which its blocks may go, from the highest tier down, each once."""
    tiers = [host_formats(config, layouts), nvme_formats(config, layouts)]
    return [list({fmt.text: fmt for fmt in passed if fmt.is_lossy}.values()) for passed in zip(*tiers, strict=True)]


def _check_device(config: PagerConfig, layouts: Sequence[KVLayout]) -> None:
    """Raises ConfigError where pages would have to be packed, and the owner of the pager does not do that."""
    plain = unpacked_layouts(layouts)
    if any(fmt.is_lossy for fmt in block_formats(config.device, plain, name="device")) and (
        packed_layouts(config.device, plain, name="device", residual=config.residual) != list(layouts)
    ):
        raise ConfigError(
            f"device={config.device!r}: only an Engine and a PrefixCache pack pages; in other hands the device tier keeps full "
            "precision: leave device out, or give formats to host and nvme instead"
        )


def _below_device(text: FormatText, layouts: Sequence[KVLayout], *, name: str) -> list[BlockFormat]:
    """Formats of a tier below. What is packed in the device tier goes down as the bytes that it is, and a tail as it is."""
    groups = [layout.name for layout in layouts if not layout.is_tail]
    texts = dict(text) if isinstance(text, Mapping) else dict.fromkeys(groups, text)
    asked = block_formats(texts, unpacked_layouts(layouts), name=name)
    for layout, fmt in zip(layouts, asked, strict=False):  # tails come last
        if layout.is_packed:
            if fmt.is_lossy and fmt.text != layout.form:
                raise ConfigError(
                    f"{name}={fmt.text!r} below device={layout.form!r}: packed pages go down as they are; one that was "
                    f"rounded again below would come back as another than went down, and answers would depend on where it has "
                    f"been: leave {name} out, or give it the format of the device tier"
                )
            texts[layout.name] = FULL
    return block_formats(texts, layouts, name=name)


def store_codecs(config: PagerConfig, layouts: Sequence[KVLayout]) -> list[str] | None:
    """What each array of the store is made with; None where the store may choose. Raises ConfigError."""
    asked = config.codecs([layout.name for layout in layouts])
    for layout, codec in zip(layouts, asked or (), strict=False):
        if layout.is_packed and SPLIT in codec:
            raise ConfigError(
                f"nvme_codec={config.nvme_codec!r} with device={layout.form!r}: {SPLIT!r} takes numbers of 2 or 4 bytes apart; "
                "packed blocks take none, lz4, zstd or aes"
            )
    formats = nvme_formats(config, layouts)
    if not any(fmt.is_lossy for fmt in formats):
        return asked
    if asked is not None and set(asked) != {NONE}:
        raise ConfigError(
            f"nvme_codec={config.nvme_codec!r} with nvme in {', '.join(fmt.text for fmt in formats)}: blocks in fewer bits are "
            "neither compressed further nor encrypted; choose one of the two"
        )
    return [fmt.text if fmt.is_lossy else NONE for fmt in formats]


def check_available(config: PagerConfig, layouts: Sequence[KVLayout]) -> None:
    """Raises ConfigError for a format that this machine's torch has not. Loads torch where there are formats."""
    for name, formats in (("host", host_formats(config, layouts)), ("nvme", nvme_formats(config, layouts))):
        for fmt in formats:
            if fmt.is_lossy:
                from ..tiers.packing import check_torch

                check_torch(fmt, name=name)
    if any(layout.is_packed for layout in layouts):
        from ..tiers.packing import check_torch

        for fmt in block_formats(config.device, unpacked_layouts(layouts), name="device"):
            check_torch(fmt, name="device")


def check_kept(path: object, kept: Sequence[str] | None, asked: Sequence[str] | None) -> None:
    """Raises StoreMismatchError where a store's blocks are rounded and that was not asked for, or the other way round."""
    if kept is None:
        return
    for has, wanted in zip(kept, asked or [NONE] * len(kept), strict=True):
        if has != wanted and (is_lossy(has) or is_lossy(wanted)):
            said = f"nvme={has!r}" if is_lossy(has) else "nvme='full'"
            raise StoreMismatchError(
                f"store {path} keeps blocks as {has!r}, and {wanted!r} is asked for: say {said}, or use another path; blocks "
                "that were rounded differently are never mixed"
            )


def refuse_formats(config: PagerConfig, *, who: str) -> None:
    """Raises ConfigError where formats are asked of somebody who has none."""
    for setting in ("host", "nvme"):
        asked = getattr(config, setting)
        for text in asked.values() if isinstance(asked, Mapping) else (asked,):
            if text is not None and is_policy(text):
                raise ConfigError(f"{setting}={text!r}: {who} keeps blocks in full precision only; leave it out")
