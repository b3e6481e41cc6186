"""Which part of its context a request attends to: all of it, a window with sinks, or the pages that matter most.

    full                        exact
    window:4096,sinks=4         the newest tokens and the first ones; what lies between is kept, not seen
    select:32                   per layer the best 32 blocks by key summaries, sinks and newest among them
    select:32,recall=0.99       and more of them where the bound on what is left out asks for it

Here is what is asked for and what is reported back; how it is done is `selected.py`. Guards: nothing is approximate that did
not ask for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..tiers.errors import ConfigError

if TYPE_CHECKING:
    from ..pager.selecting import SliceCounts

Kind = Literal["full", "window", "select"]
MIN_PAGES = 3  # the first block, the newest whole one, and one that is chosen
DEFAULT_PAGES = 32
_NUMBERS = {"sinks": int, "recall": float}


@dataclass(frozen=True, slots=True)
class Attention:
    """Of the layers that see everything; layers with a window of their own keep it.

    window and sinks in tokens; pages in blocks of the engine's block_size, per layer and step. recall: least share of the
    attention weight of every head that is proven to be read.
    """

    kind: Kind = "full"
    window: int = 0
    sinks: int = 4
    pages: int = DEFAULT_PAGES
    recall: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("full", "window", "select"):
            raise ConfigError(f"attention={self.kind!r} is unknown; choose full, window:TOKENS or select:PAGES")
        if self.kind == "window" and (self.window < 1 or self.sinks < 0):
            raise ConfigError(
                f"attention: window={self.window}, sinks={self.sinks}; need window >= 1 and sinks >= 0, as in "
                "window:4096,sinks=4"
            )
        if self.kind == "select" and self.pages < MIN_PAGES:
            raise ConfigError(f"attention: pages={self.pages}; select at least {MIN_PAGES}, as in select:32")
        if self.recall is not None and not 0 < self.recall < 1:
            raise ConfigError(f"attention: recall={self.recall}; need a share between 0 and 1, as in 0.99")

    @property
    def is_exact(self) -> bool:
        return self.kind == "full"

    @classmethod
    def parse(cls, text: Attention | str) -> Attention:
        """From text as in the picture above. Raises ConfigError that names what it does not understand."""
        if isinstance(text, Attention):
            return text
        if not isinstance(text, str):
            raise ConfigError(f"attention={text!r}: give text such as 'full', 'window:4096' or 'select:32'")
        first, *rest = text.strip().split(",")
        kind, _, number = first.partition(":")
        fields: dict[str, Any] = {"kind": kind.strip()}
        if number:
            fields["window" if kind == "window" else "pages"] = _number(text, number, int)
        for part in rest:
            name, equals, value = part.strip().partition("=")
            if name not in _NUMBERS or not equals:
                raise ConfigError(f"attention={text!r}: {part.strip()!r} is not sinks=N or recall=SHARE")
            fields[name] = _number(text, value, _NUMBERS[name])
        if kind == "full" and len(fields) > 1:
            raise ConfigError(f"attention={text!r}: full attention takes no numbers")
        if kind == "window" and "recall" in fields:
            raise ConfigError(f"attention={text!r}: a window proves no recall; take it out, or choose select:PAGES")
        if kind == "select" and "sinks" in fields:
            raise ConfigError(f"attention={text!r}: the first block is always selected; take sinks out")
        return cls(**fields)


def _number(text: str, value: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"attention={text!r}: {value!r} is not a number") from None


@dataclass(slots=True)
class SelectionReport:
    """What a request's steps read of its context. Pages are counted per layer and step.

    left_out_bound: no head of any layer left out more than this share of its attention weight, in any step that selected;
    left_out_mean: that bound's mean. full_steps attended to everything: prompt chunks, short contexts, and the first step
    after a resume, which reads all keys to summarise them. (Steps of up to 16 new tokens at the end of a text select.)
    Of slices_asked, picked and not resident, slices_kept lay in the cache of earlier steps, and slices_guess_used came early,
    because the layer had picked them in the step before; slices_guessed counts all that came early. What tiers round is in
    the bound: it is about blocks as any of them gives them back.
    """

    steps: int = 0
    full_steps: int = 0
    pages_read: int = 0
    pages_total: int = 0
    bytes_fetched: int = 0
    slices_asked: int = 0
    slices_kept: int = 0
    slices_guessed: int = 0
    slices_guess_used: int = 0
    bytes_of_full: int = 0  # what full attention would have had to fetch: slices of every block that is not resident
    left_out_bound: float = 0.0
    _left_out_sum: float = field(default=0.0, repr=False)
    _num_bounds: int = field(default=0, repr=False)

    @property
    def left_out_mean(self) -> float:
        return self._left_out_sum / self._num_bounds if self._num_bounds else 0.0

    @property
    def share_read(self) -> float:
        return self.pages_read / self.pages_total if self.pages_total else 1.0

    def note_slices(self, counts: SliceCounts, slice_bytes: int) -> None:
        """Add what one layer of a step asked for and brought up."""
        self.slices_asked += counts.asked
        self.slices_kept += counts.kept
        self.slices_guessed += counts.guessed
        self.slices_guess_used += counts.guess_used
        self.bytes_fetched += counts.fetched * slice_bytes

    def note_bound(self, worst: float, mean: float) -> None:
        """NaN, of keys that are none, bounds nothing: all may have been left out."""
        self.left_out_bound = max(self.left_out_bound, 1.0 if math.isnan(worst) else worst)
        self._left_out_sum += 1.0 if math.isnan(mean) else mean
        self._num_bounds += 1

    def to_dict(self) -> dict[str, float]:
        return {
            "steps": self.steps,
            "full_steps": self.full_steps,
            "pages_read": self.pages_read,
            "pages_total": self.pages_total,
            "bytes_fetched": self.bytes_fetched,
            "bytes_of_full": self.bytes_of_full,
            "slices_asked": self.slices_asked,
            "slices_kept": self.slices_kept,
            "slices_guessed": self.slices_guessed,
            "slices_guess_used": self.slices_guess_used,
            "left_out_bound": self.left_out_bound,
            "left_out_mean": self.left_out_mean,
        }
