"""`kvtier bench decode`: one decode step of a small Llama over pages, against transformers' DynamicCache and StaticCache.

All caches are filled with the same random K/V and everything fits in the device tier: this is the price of paging when
nothing moves. Ours is the time between two tokens of one answer, with all that the engine does for it; the peers' is
their model call and argmax. After each token of ours the peers take their step, so all meet the same machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams

from ...tiers.errors import ConfigError
from .harness import Row, medians

LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB = 8, 512, 8, 4, 4096
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 4
DTYPES = ("float32", "bfloat16")
WARMUP = 4  # steps not counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", default="1024,8192,32768", metavar="N,N", help="tokens in the cache")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=41, metavar="N")
    parser.add_argument(
        "--batch", type=int, default=4, metavar="N", help="answers at once, for one more row; 0 leaves it out"
    )
    parser.add_argument(
        "--formats",
        default="int8,int4",
        metavar="A,B",
        help="of packed pages in the device tier, in bfloat16 against full precision; may be empty",
    )
    parser.add_argument(
        "--resume",
        type=int,
        default=32768,
        metavar="N",
        help="tokens of a parked session to resume from disk, against its prefill; 0 leaves it out",
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of tokens per second. Raises ConfigError for contexts that are no positive numbers."""
    try:
        contexts = [int(part) for part in arguments.contexts.split(",")]
    except ValueError:
        contexts = [0]
    if min(contexts) < 1 or arguments.rounds < 1:
        raise ConfigError(f"--contexts {arguments.contexts!r}, --rounds {arguments.rounds}: need positive numbers")
    if arguments.batch < 0 or arguments.resume < 0:
        raise ConfigError(f"--batch {arguments.batch}, --resume {arguments.resume}: need 0 or more")
    rows = [row for context in contexts for row in _rows(context, arguments.dtype, arguments.rounds)]
    formats = [part for part in arguments.formats.split(",") if part]
    if formats:
        rows += [row for context in contexts for row in _packed(context, formats, arguments.rounds)]
    if arguments.batch:
        rows.append(_batched(arguments.batch, contexts[0]))
    if arguments.resume:
        rows.append(_resumed(arguments.resume))
    return rows


def _packed(context: int, formats: list[str], rounds: int) -> list[Row]:
    import torch
    import transformers

    from .packed import packed_rows

    model = _model(torch, transformers, torch.bfloat16)
    return packed_rows(model, _random_cache(torch, model, context), formats, TOKEN_BYTES // 2, VOCAB, rounds)


def _random_cache(torch: Any, model: Any, context: int) -> list[Any]:
    """K and V [kv_heads, context, head_dim] per layer."""
    generator = torch.Generator().manual_seed(1)
    shape = (KV_HEADS, context, HIDDEN // HEADS)
    return [tuple(torch.randn(*shape, generator=generator).to(model.dtype) for _ in range(2)) for _ in range(LAYERS)]


def _batched(batch: int, context: int) -> Row:
    from .batched import batched_row

    return batched_row(_float32_model, batch, context, VOCAB, TOKEN_BYTES)


def _resumed(context: int) -> Row:
    from .resume import resume_row

    return resume_row(_float32_model, context, VOCAB, TOKEN_BYTES, rounds=3)


def _float32_model() -> Any:
    import torch
    import transformers

    return _model(torch, transformers, torch.float32)


def _rows(context: int, dtype: str, rounds: int) -> list[Row]:
    import torch
    import transformers

    model = _model(torch, transformers, getattr(torch, dtype))
    cache = _random_cache(torch, model, context)
    limit = context + rounds + 64
    peers: dict[str, Callable[[], object]] = {
        "DynamicCache": _peer(torch, model, transformers.DynamicCache(config=model.config), cache),
        "StaticCache": _peer(torch, model, transformers.StaticCache(config=model.config, max_cache_len=limit), cache),
    }
    token_bytes = 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * model.dtype.itemsize
    config = PagerConfig(device_bytes=2 * token_bytes * (limit + 4096), host_bytes=0, backend="auto")
    ours = _model(torch, transformers, getattr(torch, dtype))  # the peers' model keeps its own attention
    ours.load_state_dict(model.state_dict(), assign=True)  # one set of weights: nobody finds the caches warmer
    with Engine.from_model(ours, config) as engine:
        session = engine.session("bench")
        session.inject([i % VOCAB for i in range(context)], cache)
        session.send([1], SamplingParams(max_tokens=1))
        turns = _Turns(peers)
        session.send([], SamplingParams(max_tokens=WARMUP + rounds), on_token=turns.after_our_token)
    seconds = medians({name: values[WARMUP:] for name, values in turns.seconds.items()})
    case = f"{context} tokens, {dtype}"
    return [
        Row(
            case,
            "decode",
            1 / seconds["kvtier"],
            "tokens/s",
            f"transformers {transformers.__version__} {name}",
            1 / seconds[name],
            seconds[name] / seconds["kvtier"],
            rounds,
        )
        for name in peers
    ]


class _Turns:
    """Takes the time since our last token, then lets each peer take its step."""

    def __init__(self, peers: dict[str, Callable[[], object]]) -> None:
        self._peers = peers
        self.seconds: dict[str, list[float]] = {name: [] for name in ("kvtier", *peers)}
        self._since_s = time.perf_counter()

    def after_our_token(self, _: int) -> None:
        now_s = time.perf_counter()
        self.seconds["kvtier"].append(now_s - self._since_s)
        for name, step in self._peers.items():
            start_s = time.perf_counter()
            step()
            self.seconds[name].append(time.perf_counter() - start_s)
        self._since_s = time.perf_counter()


def _peer(torch: Any, model: Any, held: Any, cache: list[Any]) -> Callable[[], object]:
    """A step of the stock model over a transformers cache filled with the same K/V."""
    with torch.inference_mode():
        for index, (k, v) in enumerate(cache):
            held.update(k[None], v[None], index)
    last = [1]

    def step() -> None:
        with torch.inference_mode():
            logits = model(torch.tensor([last]), past_key_values=held, use_cache=True, logits_to_keep=1).logits
            last[0] = int(logits[0, -1].argmax())

    return step


def _model(torch: Any, transformers: Any, dtype: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1 << 18,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    return transformers.LlamaForCausalLM(config).eval().to(dtype)
