"""`kvtier bench prefix`: what a prefix cache saves a pipeline, and how fast it hands K/V out.

RAG: questions about long documents, answered by a Llama with random weights over a new cache, then over the same store
opened again. Load: one prefix of large blocks (32 layers, 8 KV heads of 128, bf16), from host memory and from disk,
against a memcpy of the same bytes into new memory, as a load has to make it, and against one O_DIRECT reader.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kvtier import KVLayout

from ...tiers.errors import ConfigError
from .harness import Row, check_folder, interleave, medians

LAYOUT = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")  # 4 MiB blocks
QUESTION_TOKENS = 24
READ_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", default=".", metavar="DIR", help="a directory on the disk to measure")
    parser.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="of each document, and of the loaded prefix"
    )
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="with two questions about each")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError when the directory cannot be used or a number is too small."""
    if arguments.tokens < LAYOUT.block_size or arguments.documents < 1 or arguments.rounds < 1:
        raise ConfigError(
            f"--tokens {arguments.tokens}, --documents {arguments.documents}, --rounds {arguments.rounds}: need "
            f"{LAYOUT.block_size} tokens, one document and one round"
        )
    check_folder(arguments.path)
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        return _rag_rows(Path(folder), arguments) + _load_rows(Path(folder), arguments)


# ---------------------------------------------------------------------- RAG
def _rag_rows(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvtier import PrefixCache

    torch.manual_seed(0)
    size: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=1024)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=arguments.tokens + 64)
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, eos_token_id=None, pad_token_id=0)).eval()
    draw = torch.Generator().manual_seed(1)
    documents = [
        torch.randint(0, 1024, (arguments.tokens,), generator=draw).tolist() for _ in range(arguments.documents)
    ]
    questions = [torch.randint(0, 1024, (QUESTION_TOKENS,), generator=draw).tolist() for _ in range(2)]

    @torch.inference_mode()
    def answer_all() -> tuple[int, list[float]]:
        """Tokens of documents that were computed, and seconds to the first token of each answer."""
        computed, ttfts_s = 0, []
        with PrefixCache.open(
            folder / "rag", model, device_bytes="64MiB", host_bytes="256MiB", nvme_bytes="1GiB"
        ) as cache:
            for document in documents:
                for question in questions:
                    start_s = time.perf_counter()
                    n, past = cache.load(document + question)
                    model(torch.tensor([(document + question)[n:]]), past_key_values=past, logits_to_keep=1)
                    ttfts_s.append(time.perf_counter() - start_s)
                    computed += max(0, len(document) - n)
                    cache.store(document, past)
        return computed, ttfts_s

    model(torch.tensor([[1, 2, 3]]))
    first, first_ttfts_s = answer_all()
    again, again_ttfts_s = answer_all()
    case = f"{arguments.documents} documents of {arguments.tokens} tokens, two questions each, Llama of 4 layers"
    cold_s, warm_s = statistics.median(first_ttfts_s[::2]), statistics.median(again_ttfts_s)
    return [
        _saved(case, "document tokens not computed, first run", 2 * arguments.tokens * len(documents), first),
        _saved(case, "document tokens not computed, second run", 2 * arguments.tokens * len(documents), again),
        Row.of_times(case, "time to first token, second run", "ms", warm_s, "document not stored yet", cold_s, 1e3, 1),
    ]


def _saved(case: str, metric: str, asked: int, computed: int) -> Row:
    return Row(case, metric, asked - computed, "tokens", "document tokens in the prompts", asked, 1 - computed / asked)


# ---------------------------------------------------------------------- load
def _load_rows(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    import torch

    from kvtier import PrefixCache

    tokens, rounds = arguments.tokens // LAYOUT.block_size * LAYOUT.block_size, arguments.rounds
    past = torch.randn(LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, tokens, LAYOUT.head_dim).bfloat16()
    nbytes, ids = past.numel() * past.element_size(), list(range(tokens))
    settings: dict[str, Any] = dict(
        layout=LAYOUT,
        model_fingerprint="bench",
        device_bytes="64MiB",
        host_bytes=nbytes + (64 << 20),
        nvme_bytes=4 * nbytes + (256 << 20),
    )
    with PrefixCache.open(folder / "load", **settings) as cache:
        store_s = _timed(lambda: cache.store(ids, past))
        cache.load([*ids, 0])
        used = torch.empty_like(past)
        cases = {
            "load": lambda: cache.load([*ids, 0]),
            "memcpy into new memory": lambda: torch.empty_like(past).copy_(past),
            "memcpy": lambda: used.copy_(past),
        }
        seconds = medians(interleave(cases, rounds, warmup=1))
    cold_s, raw_s = [], []
    raw = folder / "raw"
    raw.write_bytes(past.view(torch.int16).numpy().tobytes())
    for _ in range(rounds):
        with PrefixCache.open(folder / "load", **settings) as cache:
            cold_s.append(_timed(lambda cache=cache: cache.load([*ids, 0])))  # type: ignore[misc]
        raw_s.append(_timed(lambda: _read_direct(raw)))
    case = f"prefix of {tokens} tokens, {nbytes >> 20} MiB, blocks of 4 MiB"

    def rate(name: str, spent_s: float, reference: str, reference_s: float) -> Row:
        scale = nbytes * 1e-9
        return Row(case, name, scale / spent_s, "GB/s", reference, scale / reference_s, reference_s / spent_s, rounds)

    return [
        rate("load, in host memory", seconds["load"], "memcpy into new memory", seconds["memcpy into new memory"]),
        rate("load, in host memory", seconds["load"], "memcpy", seconds["memcpy"]),
        rate("load, on disk", statistics.median(cold_s), "O_DIRECT, one reader, 4 MiB reads", statistics.median(raw_s)),
        rate("store, first call", store_s, "memcpy into new memory", seconds["memcpy into new memory"]),
    ]


def _timed(call: Any) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _read_direct(path: Path) -> None:
    """Read a file past the page cache, into one buffer; through it where the file system knows no O_DIRECT."""
    buffer = mmap.mmap(-1, READ_BYTES)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while n := os.preadv(fd, [buffer], at):
            at += n
    finally:
        os.close(fd)
