"""Parts: which layers and KV heads of a layer group the device tier keeps in one format, and how a group is cut into them.

    int4; layers 0-1: bf16             the first two layers in full precision, the others in int4
    int4; heads 0: int8                of every layer the first KV head in int8
    int4; layers 2-3 heads 0,5: bf16   both at once

Each part becomes a layer group of its own, with pages, tables and block sizes of its own: so every block of a group has one
size and one form, and nobody below needs to know that layers differ. Text and names only; hf.py cuts a model's layers.
Guards: every head of every layer is in exactly one part, and no part is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .formats import BlockFormat, FormatText, Kind, Policy, check_dtype, policies_of
from .layout import KVLayout

EXACT = "exact"  # names a part in full precision beside others


@dataclass(frozen=True, slots=True)
class GroupPart:
    """Layers of a group, by their number in it, and KV heads of each, that share a format."""

    name: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kind: Kind

    def text_below(self, fmt: BlockFormat) -> str:
        """What a format of the whole group, in a tier below, says of these layers."""
        return BlockFormat(fmt.layout, tuple(fmt.layers[i] for i in self.layers)).text


def split_groups(text: FormatText, layouts: Sequence[KVLayout], *, name: str) -> list[list[GroupPart]]:
    """The parts of each layer group; first, under the group's name, the one in the format that is named first.

    Raises ConfigError.
    """
    policies = policies_of(text, layouts, name=name)
    for policy in policies:
        for other in policy.others:
            if other.heads is not None and other.heads[1] >= (most := max(one.num_kv_heads for one in layouts)):
                raise ConfigError(
                    f"{name}={text!r}: there is no KV head {other.heads[1]}; heads are numbered 0 to {most - 1}"
                )
    return [_parts(policy, layout, name) for policy, layout in zip(policies, layouts, strict=True)]


def _parts(policy: Policy, layout: KVLayout, setting: str) -> list[GroupPart]:
    found: dict[tuple[Kind, tuple[int, ...]], list[int]] = {}
    for layer in range(layout.num_layers):
        heads: dict[Kind, list[int]] = {}
        for head in range(layout.num_kv_heads):
            kind = policy.of(layer, head)
            check_dtype(kind, layout, setting)
            heads.setdefault(Kind() if kind.is_full else kind, []).append(head)
        for kind, those in heads.items():
            found.setdefault((kind, tuple(those)), []).append(layer)
    parts = list[GroupPart]()
    main = Kind() if policy.kind.is_full else policy.kind
    order = sorted(found.items(), key=lambda item: (item[0][0] != main, -len(item[0][1]) * len(item[1])))
    for (kind, mine), layers in order:
        name = _name(layout.name, kind, {part.name for part in parts})
        parts.append(GroupPart(name, tuple(layers), mine, kind))
    return parts


def _name(group: str, kind: Kind, taken: Collection[str]) -> str:
    if not taken:
        return group
    name = f"{group}-{EXACT if kind.is_full else kind.name}"
    return next(tried for n in range(1, len(taken) + 2) if (tried := name if n == 1 else f"{name}-{n}") not in taken)
