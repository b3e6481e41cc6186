"""`kvtier bench select`: a long context of which each step reads the pages that matter, against reading all of it.

The needle model asks for pairs far back, so a page that is not picked is a wrong answer. First how often the needle's page
is among the k best of all pages; then whole answers through an engine whose device tier holds a tenth of the context, and a
fifth beside it for key summaries and for slices, with what their steps read and fetched. The slices that were fetched stay
in their cache from answer to answer, as in a chat; what a layer picked in the step before and the cache no longer holds is
brought early, as a guess. Guesses are rare where the cache is ample, so one case picks so many pages that the layers of a
step push each other out. The reference is full attention, streamed,
in the same engine and run: of packed pages it is full attention on packed pages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams

from ...engine.attending import Attention
from ...tiers.errors import ConfigError
from ...tiers.layout import FULL
from .harness import Row

BLOCK = 16  # tokens per page: small pages are what makes selection sharp
NUM_NEEDLES, VALUE_TOKENS = 16, 4
TOKEN_BYTES = 2048  # of the needle model in float32
SLICE_BYTES = BLOCK * TOKEN_BYTES // 2  # one of two layers
CROWDED_SHARE = 70  # per cent of the cache of slices that one layer picks, in the crowded case
DEVICE_SHARE = 10  # per cent of the context's KV, beside the summaries and slices of selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="tokens (default 131072)")
    parser.add_argument("--picks", default="8,16,32", metavar="N,N", help="pages per layer and step (default 8,16,32)")
    parser.add_argument(
        "--formats", default="int8", metavar="A,B", help="of packed pages that are selected from, too; may be empty"
    )
    parser.add_argument(
        "--full-needles", type=int, default=4, metavar="N", help="answers by full attention (default 4)"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of recall, needles, shares, bytes and seconds. Raises ConfigError for picks and contexts that cannot be."""
    picks = [int(part) if part.isdecimal() else 0 for part in arguments.picks.split(",")]
    if min(picks) < 3 or arguments.context < 1024 or not 1 <= arguments.full_needles <= NUM_NEEDLES:
        raise ConfigError(
            f"--picks {arguments.picks!r}, --context {arguments.context}, --full-needles {arguments.full_needles}: need "
            f"picks from 3 up, 1024 tokens or more, 1 to {NUM_NEEDLES} needles"
        )
    from ...engine.needle import NeedleSpec, build_needle_model, needle_prompt
    from ...engine.needle_check import build_needle_cache

    spec = NeedleSpec()
    model = build_needle_model(spec)
    ids, needles = needle_prompt(spec, arguments.context, NUM_NEEDLES, num_values=VALUE_TOKENS)
    cache = build_needle_cache(model, ids)
    rows = _recall(model, ids, needles, cache, picks)
    for device in (FULL, *(part for part in arguments.formats.split(",") if part)):
        rows += _answers(model, ids, needles, cache, picks, arguments.full_needles, device)
    return rows


def _recall(model: Any, ids: list[int], needles: Sequence[Any], cache: Any, picks: list[int]) -> list[Row]:
    """How often the page that answers a query is among the k picked, sinks and newest counted."""
    import torch

    from ...engine.needle_check import searching_query
    from ...kernels import score_pages, select_pages, summarize_blocks

    k_1 = cache[1][0]
    count = len(ids) // BLOCK
    pages = k_1[:, : count * BLOCK].unflatten(1, (count, BLOCK)).transpose(0, 1)
    summaries = torch.empty(count, k_1.shape[0], 2, k_1.shape[2], dtype=k_1.dtype)
    summarize_blocks(pages, range(count), summaries, range(count))
    queries, wanted = [], []
    for needle in needles:
        said = [needle.key, *needle.values]
        for step in range(VALUE_TOKENS):
            queries.append(searching_query(model, [*ids, *said[: step + 1]]))
            wanted.append((needle.position + step + 1) // BLOCK)
    table = torch.arange(count).expand(len(queries), count).numpy()
    counts = [count] * len(queries)
    scores = score_pages(torch.stack(queries), summaries, table, counts)
    rows = []
    for k in picks:
        chosen = select_pages(scores, counts, k, scale=k_1.shape[2] ** -0.5).chosen
        found = sum(bool(chosen[i, page]) for i, page in enumerate(wanted)) / len(wanted)
        rows.append(
            Row(f"{k} of {count:,} pages", "recall of the needle's page", found, "share", "all pages", 1.0, found)
        )
    return rows


def _answers(
    model: Any,
    ids: list[int],
    needles: Sequence[Any],
    cache: Any,
    picks: list[int],
    full_needles: int,
    device: str,
) -> list[Row]:
    size = len(ids) * TOKEN_BYTES
    selection = size // 5  # summaries take a sixteenth at this block size
    budget, pages = size * DEVICE_SHARE // 100 + selection, _pages_of(device)
    config = PagerConfig(budget, 2 * size, device=device, selection_bytes=selection, backend="auto")
    rows = []
    with Engine.from_model(model, config, block_size=BLOCK) as engine:
        session = engine.session("bench")
        session.inject(ids, cache)
        _ask(session, needles[:1], "select:8", len(ids))  # the first step reads everything and summarises it
        full = _ask(session, needles[:full_needles], "full", len(ids))
        for k in picks:
            found = _ask(session, needles, f"select:{k}", len(ids))
            rows += _rows_of(f"{k} {pages}, {len(ids):,} tokens", found, full) + _slice_rows(f"{k} {pages}", found)
        if device != FULL:
            return rows
        crowd = selection // 2 // SLICE_BYTES * CROWDED_SHARE // 100
        found = _ask(session, needles[:full_needles], f"select:{crowd}", len(ids))
        rows += _slice_rows(f"{crowd} pages a layer, more than the cache holds", found)
    return rows


def _pages_of(device: str) -> str:
    return "pages" if device == FULL else f"pages in {device}"


def _slice_rows(case: str, ours: dict[str, Any]) -> list[Row]:
    """Where the picked slices were when they were asked for."""
    names = ("slices_asked", "slices_kept", "slices_guess_used", "slices_guessed")
    asked, kept, used, guessed = (sum(getattr(r, name) for r in ours["reports"]) for name in names)
    rows = []
    for metric, part, whole, of in (
        ("slices kept from earlier steps", kept, asked, "slices picked and not resident"),
        ("slices that came early by a guess", used, asked, "slices picked and not resident"),
        ("guesses that were picked", used, guessed, "slices guessed"),
    ):
        share = part / whole if whole else None
        rows.append(Row(case, metric, 100 * (share or 0.0), "%", of, 100.0, share or None, ours["asked"]))
    return rows


def _ask(session: Any, needles: Sequence[Any], attention: str, length: int) -> dict[str, Any]:
    """Every needle once, rolled back after each. Seconds are between the tokens of an answer."""
    exact, seconds, reports = 0, list[float](), []
    for needle in needles:
        times = [time.perf_counter()]
        out = session.send(
            [needle.key],
            SamplingParams(max_tokens=VALUE_TOKENS, attention=Attention.parse(attention)),
            on_token=lambda _, times=times: times.append(time.perf_counter()),
        )
        exact += tuple(out.token_ids) == tuple(needle.values)
        seconds += [after - before for before, after in pairwise(times)]
        reports.append(out.selection)
        session.rollback(length)
    return {"asked": len(needles), "exact": exact, "s": statistics.median(seconds), "reports": reports}


def _rows_of(case: str, ours: dict[str, Any], full: dict[str, Any]) -> list[Row]:
    reports, asked = ours["reports"], ours["asked"]
    read, total = (sum(getattr(r, name) for r in reports) for name in ("pages_read", "pages_total"))
    steps = sum(r.steps for r in reports)
    fetched, of_full = (sum(getattr(r, name) for r in reports) / steps for name in ("bytes_fetched", "bytes_of_full"))
    bound = max(r.left_out_bound for r in reports)
    right, reference = ours["exact"] / asked, full["exact"] / full["asked"]
    everything = "full attention, streamed"
    return [
        Row(case, "exact answers", right, "share", everything, reference, right / reference, asked),
        Row(case, "pages read per step", 100 * read / total, "%", everything, 100.0, total / read, steps),
        Row(
            case,
            "bytes promoted per token",
            fetched / 2**20,
            "MiB",
            everything,
            of_full / 2**20,
            of_full / fetched if fetched else None,
            steps,
        ),
        Row(
            case, "attention weight left out, bound", bound, "share", "full attention leaves out nothing", rounds=steps
        ),
        Row.of_times(case, "time per token", "ms", ours["s"], everything, full["s"], 1e3, asked * VALUE_TOKENS),
    ]
