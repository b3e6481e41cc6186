"""Formats of a tier: how many bits each layer of a block keeps there, from the text of a setting to sizes in bytes.

    int4                        every layer in int4, values that share a scale in groups of 64
    int4/128                    in groups of 128
    int4; layers 0-1,7: bf16    but for these layers (numbered within their layer group), which stay in full precision

Numbers only; packing.py moves the bytes. Guards: a tier is never more precise than the one above it, because bits that
were rounded away do not come back, and a format that a layer's shape cannot take is refused before anything is opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ..kernels.formats import FORMATS, GROUPS, PageFormat
from .errors import ConfigError
from .layout import FULL, TAIL, KVLayout

_PRECISE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # other names of full, where that is the dtype
_DEFAULT_GROUP = 64
_KIND = re.compile(r"([a-z]+[0-9]*)(?:/([0-9]+))?")
_OTHER = re.compile(r"(?:layers?\s+([0-9,\s-]+?)\s*)?(?:heads?\s+([0-9,\s-]+?)\s*)?:\s*(\S+)")
FormatText = str | Mapping[str, str]  # one for all layer groups, or one per group by its name


@dataclass(frozen=True, slots=True)
class Kind:
    """One format by name, not yet fitted to a shape."""

    name: str = FULL
    group: int = _DEFAULT_GROUP

    @property
    def text(self) -> str:
        """As settings say it; fp8 has one scale per block and head."""
        return self.name if self.is_full or self.name == "fp8" else f"{self.name}/{self.group}"

    @property
    def is_full(self) -> bool:
        return self.name not in FORMATS


@dataclass(frozen=True, slots=True)
class Other:
    """A format for some layers, for some KV heads, or for these heads of these layers; None means all."""

    layers: tuple[int, int] | None  # first and last
    heads: tuple[int, int] | None
    kind: Kind

    def is_for(self, layer: int, head: int) -> bool:
        return _holds(self.layers, layer) and _holds(self.heads, head)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a text says: a format for everything, and others for some of it."""

    kind: Kind
    others: tuple[Other, ...] = ()

    def of(self, layer: int, head: int = 0) -> Kind:
        return next((other.kind for other in reversed(self.others) if other.is_for(layer, head)), self.kind)


@dataclass(frozen=True)
class BlockFormat:
    """Formats of the layers of one block: None where a layer stays in full precision."""

    layout: KVLayout
    layers: tuple[PageFormat | None, ...]

    @cached_property
    def is_lossy(self) -> bool:
        return any(layer is not None for layer in self.layers)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each layer begins in a packed block, and, last, where the block ends."""
        sizes = [self.layout.layer_bytes if layer is None else layer.layer_bytes for layer in self.layers]
        return (0, *accumulate(sizes))

    @property
    def block_bytes(self) -> int:
        return self.starts[-1]

    def layer_bytes(self, layer: int) -> int:
        return self.starts[layer + 1] - self.starts[layer]

    @cached_property
    def text(self) -> str:
        """The shortest way to say it; two formats are the same where their texts and layouts are."""
        kinds = [_said(layer) for layer in self.layers]
        most = max(dict.fromkeys(kinds), key=kinds.count)
        runs: list[tuple[int, int, str]] = []
        for i, kind in enumerate(kinds):
            if runs and runs[-1][1] == i - 1 and runs[-1][2] == kind:
                runs[-1] = (runs[-1][0], i, kind)
            elif kind != most:
                runs.append((i, i, kind))
        others = (f"layers {a if a == b else f'{a}-{b}'}: {kind}" for a, b, kind in runs)
        return "; ".join([most, *others])


def parse_policy(text: object, *, name: str) -> Policy:
    """What a setting says. Raises ConfigError."""
    if not isinstance(text, str):
        raise ConfigError(f"{name}={text!r}: give a format such as 'int8', or 'int4; layers 0-1: bf16'")
    first, *rest = (part.strip() for part in text.split(";"))
    others: list[Other] = []
    for part in rest:
        match = _OTHER.fullmatch(part)
        if match is None or match[1] is match[2] is None:
            raise ConfigError(f"{name}={text!r}: {part!r} is not of the form 'layers 0-1: bf16' or 'heads 0: bf16'")
        kind = _parse_kind(match[3], text, name)
        layers, heads = (_parse_ranges(spans, text, name) for spans in match.groups()[:2])
        others += [Other(a, b, kind) for a in layers for b in heads]
    return Policy(_parse_kind(first, text, name), tuple(others))


def is_policy(text: str) -> bool:
    """Whether this is the text of formats at least one of which is lossy."""
    try:
        policy = parse_policy(text, name="format")
    except ConfigError:
        return False
    return any(not kind.is_full for kind in (policy.kind, *(other.kind for other in policy.others)))


def block_formats(text: FormatText, layouts: Sequence[KVLayout], *, name: str) -> list[BlockFormat]:
    """A format per layer group. Raises ConfigError naming the setting, what does not fit, and what would."""
    policies = policies_of(text, layouts, name=name)
    if any(other.heads is not None for policy in policies for other in policy.others):
        raise ConfigError(f"{name}={text!r}: only the device tier of an Engine keeps heads in formats of their own")
    return [_fitted(policy, layout, name) for policy, layout in zip(policies, layouts, strict=True)]


def policies_of(text: FormatText, layouts: Sequence[KVLayout], *, name: str) -> list[Policy]:
    """What a setting says of each layer group. Raises ConfigError for groups and layers that there are not."""
    groups = [layout.name for layout in layouts]
    texts = dict(text) if isinstance(text, Mapping) else dict.fromkeys(groups, text)
    for group in texts:
        if group not in groups:
            raise ConfigError(f"{name}={text!r}: there is no layer group {group!r}; this model has {', '.join(groups)}")
    policies = [parse_policy(texts.get(group, FULL), name=name) for group in groups]
    longest = max(layout.num_layers for layout in layouts)
    for policy in policies:
        for other in policy.others:
            if other.layers is not None and (last := other.layers[1]) >= longest:
                raise ConfigError(f"{name}={text!r}: there is no layer {last}; layers are numbered 0 to {longest - 1}")
    return policies


def packed_layouts(text: FormatText, layouts: Sequence[KVLayout], *, name: str, residual: int = 0) -> list[KVLayout]:
    """Layouts for a device tier in these formats: packed groups where they stood, and behind all of them a tail for each.

    A tail holds the block that is being filled, a new chunk, and whole blocks as far as `residual` tokens back: it sees those
    beside the token that comes. Raises as block_formats, and ConfigError where layers of one group differ: parts.py cuts
    such groups.
    """
    made, tails = list(layouts), list[KVLayout]()
    for index, fmt in enumerate(block_formats(text, layouts, name=name)):
        layout, kinds = fmt.layout, set(fmt.layers)
        if not fmt.is_lossy:
            continue
        if len(kinds) > 1:
            raise ConfigError(
                f"{name}={fmt.text!r}: the device tier keeps all layers of a layer group in one format; an Engine cuts groups "
                f"by that, here make layers of {layout.name!r} that differ a group (a layout) of their own"
            )
        if layout.sinks > layout.block_size:
            raise ConfigError(
                f"{name}={fmt.text!r}: {layout.sinks} sinks do not lie within one block of {layout.block_size} tokens of layer "
                f"group {layout.name!r}; use a larger block_size"
            )
        made[index] = replace(layout, form=fmt.text, packed_bytes=fmt.layer_bytes(0))
        tails.append(replace(layout, name=f"{layout.name}-{TAIL}", window=_seen(layout, residual), sinks=0, form=TAIL))
    return made + tails


def _seen(layout: KVLayout, residual: int) -> int:
    """Tokens that a tail keeps in sight, the one that comes among them: whole blocks, so that the tokens of one block, which
    may be drafted and computed together, see the same."""
    seen = -(-residual // layout.block_size) * layout.block_size + 1
    return seen if layout.window is None else min(seen, layout.window)


def tail_of(layouts: Sequence[KVLayout], group: int) -> int:
    """The group that holds new tokens of this one in full precision: itself where it is not packed."""
    if not layouts[group].is_packed:
        return group
    tails = [index for index, layout in enumerate(layouts) if layout.is_tail]
    return tails[sum(layout.is_packed for layout in layouts[:group])]


def unpacked_layouts(layouts: Sequence[KVLayout]) -> list[KVLayout]:
    """The inverse of packed_layouts."""
    return [replace(layout, form=FULL, packed_bytes=0) for layout in layouts if not layout.is_tail]


def page_format(layout: KVLayout) -> PageFormat:
    """How the layers of a packed layout lie. Raises ConfigError for a form of another version."""
    fmt = _page_format(_parse_kind(layout.form, layout.form, "form"), layout, "form")
    if fmt.layer_bytes != layout.packed_bytes:
        raise ConfigError(
            f"packed_bytes={layout.packed_bytes}: a layer in {layout.form!r} takes {fmt.layer_bytes} in this version"
        )
    return fmt


def check_order(upper: BlockFormat, lower: BlockFormat, *, names: tuple[str, str]) -> None:
    """Raises ConfigError where a layer would be rounded anew without becoming smaller."""
    for i, (above, below) in enumerate(zip(upper.layers, lower.layers, strict=True)):
        if above is None or above == below:
            continue
        if below is None or below.bits >= above.bits:
            raise ConfigError(
                f"{names[1]}={lower.text!r} below {names[0]}={upper.text!r}: layer {i} is {_said(above)} in the tier above, so "
                f"{_said(below)} below it regains nothing; give it the same format, or one of fewer bits"
            )


def _fitted(policy: Policy, layout: KVLayout, name: str) -> BlockFormat:
    made: list[PageFormat | None] = []
    for layer in range(layout.num_layers):
        kind = policy.of(layer)
        check_dtype(kind, layout, name)
        made.append(None if kind.is_full else _page_format(kind, layout, name))
    fitted = BlockFormat(layout, tuple(made))
    if fitted.is_lossy and fitted.block_bytes >= layout.block_bytes:
        raise ConfigError(
            f"{name}={fitted.text!r}: a block of {layout.block_bytes} bytes would take {fitted.block_bytes} with its scales; "
            "use fewer bits or a larger block_size"
        )
    return fitted


def _page_format(kind: Kind, layout: KVLayout, name: str) -> PageFormat:
    try:
        return PageFormat(
            kind.name, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.value_dim, kind.group
        )
    except ValueError as error:
        raise ConfigError(f"{name}={kind.name!r} does not fit layer group {layout.name!r}: {error}") from error


def check_dtype(kind: Kind, layout: KVLayout, name: str) -> None:
    """Raises ConfigError where full precision is asked for as another dtype than the model's."""
    if kind.name in _PRECISE and _PRECISE[kind.name] != layout.dtype:
        raise ConfigError(f"{name}={kind.name!r}: this model's KV is {layout.dtype}; say {FULL!r} for full precision")


def _parse_kind(word: str, text: str, name: str) -> Kind:
    match = _KIND.fullmatch(word)
    if match is None or match[1] not in (FULL, *_PRECISE, *FORMATS):
        raise ConfigError(f"{name}={text!r}: {word!r} is unknown; choose {', '.join((FULL, *_PRECISE, *FORMATS))}")
    if match[2] is None:
        return Kind(match[1])
    if match[1] not in FORMATS or match[1] == "fp8" or int(match[2]) not in GROUPS:
        raise ConfigError(
            f"{name}={text!r}: {word!r}: groups of {', '.join(map(str, GROUPS))} values, as in 'int4/128'"
        )
    return Kind(match[1], int(match[2]))


def _said(page: PageFormat | None) -> str:
    if page is None:
        return FULL
    return Kind(page.name, page.group).text


def _holds(span: tuple[int, int] | None, number: int) -> bool:
    return span is None or span[0] <= number <= span[1]


def _parse_ranges(spans: str | None, text: str, name: str) -> list[tuple[int, int] | None]:
    """All ranges of a list; what is not given means everything."""
    return [None] if spans is None else [_parse_range(span.strip(), text, name) for span in spans.split(",")]


def _parse_range(span: str, text: str, name: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", span)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise ConfigError(f"{name}={text!r}: {span!r} is no layer and no range of layers such as 0-1")
    return int(match[1]), int(match[2] or match[1])
