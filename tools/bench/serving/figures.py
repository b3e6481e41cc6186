"""From answers to rows: percentiles, rates, shares, and how many went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..harness import Row
from .client import REFUSED, Answer, Load

WITHOUT = "nothing reused: a salt per request"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def later(load: Load) -> list[Answer]:
    """Answered turns that have one before them; all answers where there are no turns."""
    return [answer for answer in load.done if answer.turn > 0] or load.done


def first_token_s(load: Load) -> list[float]:
    return [answer.first_s for answer in later(load)]


def between_tokens_s(load: Load) -> list[float]:
    return [answer.token_s for answer in load.done if answer.token_s is not None]


def output_rate(load: Load) -> float:
    """Tokens per second."""
    return sum(answer.completion_tokens for answer in load.done) / load.seconds


def rows_of(case: str, ours: Load, without: Load) -> list[Row]:
    """Raises: RuntimeError when nothing was answered, with or without reuse."""
    for load in (ours, without):
        if not load.done:
            raise RuntimeError(f"{case}: nothing was answered, status {sorted({a.status for a in load.answers})}")
    rows = _latencies(case, ours, without)
    rows += [
        _rate(case, "output tokens", output_rate(ours), output_rate(without), "1/s"),
        _rate(case, "requests", len(ours.done) / ours.seconds, len(without.done) / without.seconds, "1/s"),
    ]
    return rows + _shares(case, ours) + _outcomes(case, ours, without)


def _latencies(case: str, ours: Load, without: Load) -> list[Row]:
    rows = []
    has_turns = any(answer.turn > 0 for answer in ours.done)
    for share in (0.5, 0.9, 0.99):
        values = percentile(first_token_s(ours), share), percentile(first_token_s(without), share)
        name = f"TTFT p{100 * share:.0f}" + (", later turns" if has_turns else "")
        rows.append(_times(case, name, *values))
    if has_turns:
        firsts = [[a.first_s for a in load.done if a.turn == 0] for load in (ours, without)]
        if all(firsts):
            rows.append(_times(case, "TTFT p50, first turn", *(percentile(one, 0.5) for one in firsts)))
    for share in (0.5, 0.99):
        between = [between_tokens_s(load) for load in (ours, without)]
        if all(between):
            rows.append(_times(case, f"TPOT p{100 * share:.0f}", *(percentile(one, share) for one in between)))
    return rows


def _shares(case: str, load: Load) -> list[Row]:
    prompts, cached, known, again = (
        sum(getattr(answer, name) for answer in load.done)
        for name in ("prompt_tokens", "cached_tokens", "known_tokens", "recomputed_tokens")
    )
    seen = "of prompt tokens seen before"
    return [
        Row(
            case,
            "cached share of prompt tokens",
            100 * cached / prompts,
            "%",
            seen,
            100 * known / prompts,
            cached / known if known else None,
        ),
        Row(case, "share computed again", 100 * again / prompts, "%", "aim: none", 0.0),
    ]


def _outcomes(case: str, ours: Load, without: Load) -> list[Row]:
    asked = len(ours.answers)
    right, refused, failed = _counts(ours)
    other_right, other_refused, other_failed = _counts(without)
    return [
        Row(case, "right answers", right, "", "asked", asked, right / asked),
        Row(case, "refused with 429", refused, "", WITHOUT, other_refused),
        Row(case, "failed", failed, "", WITHOUT, other_failed),
        Row(case, "right answers, nothing reused", other_right, "", "asked", asked, other_right / asked),
    ]


def _counts(load: Load) -> tuple[int, int, int]:
    """Right, refused, failed."""
    refused = sum(answer.status == REFUSED for answer in load.answers)
    return sum(answer.is_right for answer in load.done), refused, len(load.answers) - len(load.done) - refused


def _times(case: str, metric: str, ours_s: float, without_s: float) -> Row:
    return Row.of_times(case, metric, "ms", ours_s, WITHOUT, without_s, 1e3, 1)


def _rate(case: str, metric: str, ours: float, without: float, unit: str) -> Row:
    return Row(case, metric, ours, unit, WITHOUT, without, ours / without)
