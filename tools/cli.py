"""The `kvtier` command: demo, chat, serve, bench, ... Exit codes: 0 done, 1 wrong or bad, 2 refused in one clear line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..tiers.errors import KvTierError
from .format_flags import add_format_flags

BENCHES = {
    "demo": "the demo's first token after its restart, against its prefill and against another checkout",
    "attention": "attention over pages, full and compressed, against torch on contiguous KV and the memory's speed",
    "accuracy": "needles found, and by what margin, with KV in 8, 4 and 2 bits or from selected pages",
    "select": "selected attention at 128K tokens: needles found, pages and bytes read, against reading everything",
    "stream": "a context ten times the device tier: time per token against the memory's speed",
    "kernels": "registers, shared memory and spills of every Triton kernel, without a GPU",
    "decode": "a decode step of an HF model over pages, against transformers' own caches",
    "nvme": "the Zarr store against the disk (fio) and against zarr-python",
    "ring": "what a put costs once the store is full and segments are reclaimed, against filling it",
    "recovery": "opening a store that lists a million blocks, and an empty one",
    "endless": "a text without end through a window with sinks, in flat memory",
    "sessions": "many long chats on few pages, every answer checked, over restarts",
    "serve": "the server over HTTP under a recorded trace and many chats, against serving with nothing reused",
    "prefix": "what a prefix cache saves a RAG pipeline, and loading K/V against memcpy and the disk",
    "host": "moving scattered blocks between the memory tiers, against memcpy",
    "capacity": "tokens that a budget of bytes holds in each tier, format by format, through the pager",
    "codecs": "how much smaller codecs make KV, how fast on one core, and what a store makes of it",
    "policy": "the default policy against every other one and Belady, on two real traces",
    "prefetch": "how long requests wait for blocks with prefetch and without, on traces in virtual time",
    "tenants": "what encryption at rest costs, and whether a lookup tells what another tenant has",
    "daemon": "pagerd: look-ups by one and eight clients against a call in-process, blocks through its slab against memcpy",
    "inspect": "what looking costs: views at a million blocks, the ring of decisions, being watched",
    "metadata": "what the pager's books cost per block of a long prompt",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; an error of ours is one line on stderr and exit code 2."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(words).parse_args(words)
    try:
        return int(arguments.run(arguments))
    except KvTierError as error:
        print(f"kvtier: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """What a command takes is imported where `words` name it: a benchmark may need torch, help shall not."""
    parser = argparse.ArgumentParser(prog="kvtier", description="Tiered KV-cache storage for LLM inference.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="a long chat through three tiers, checked answer by answer")
    demo.add_argument("--context", type=int, default=131072, metavar="N", help="tokens of context (default 131072)")
    demo.add_argument("--needles", type=int, default=16, metavar="N", help="answers to ask for (default 16)")
    size = demo.add_mutually_exclusive_group()
    size.add_argument("--device-blocks", type=int, metavar="N", help="device tier in blocks")
    size.add_argument("--device-bytes", metavar="SIZE", help="device tier, e.g. 24MiB (default 10%% of the KV)")
    demo.add_argument("--host-bytes", metavar="SIZE", help="host tier (default 30%% of the KV)")
    demo.add_argument("--nvme-bytes", metavar="SIZE", help="Zarr store (default twice the KV)")
    demo.add_argument("--nvme-codec", metavar="NAME", help="none (default), lz4, zstd or split")
    add_format_flags(demo)
    demo.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per block (default 256, less for small tiers)"
    )
    demo.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default float32)")
    demo.add_argument("--store", metavar="PATH", help="directory of the Zarr store (default: a temporary one)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--fast-fill", action="store_true", help="build the cache in O(n) instead of a real prefill")
    demo.add_argument("--json", action="store_true", help="one JSON object instead of bars and a table")
    demo.set_defaults(run=_demo)
    chat = commands.add_parser("chat", help="chat with a local Hugging Face checkpoint; sessions survive restarts")
    chat.add_argument("--model", required=True, metavar="PATH")
    chat.add_argument("--session", default="chat", metavar="ID")
    chat.add_argument("--store", metavar="PATH", help="directory of the Zarr store (default: none, nothing survives)")
    chat.add_argument(
        "--pager",
        metavar="ADDRESS",
        help="unix:///... or tls://host:port of a pagerd, which keeps the blocks and the session",
    )
    chat.add_argument("--device-bytes", default="256MiB", metavar="SIZE")
    chat.add_argument("--host-bytes", default="1GiB", metavar="SIZE")
    chat.add_argument(
        "--nvme-bytes", metavar="SIZE", help="most that the store may take (default 80%% of the free disk)"
    )
    chat.add_argument(
        "--nvme-codec", metavar="NAME", help="how a new store keeps blocks: none (default), lz4, zstd, split"
    )
    add_format_flags(chat)
    chat.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer (default 128)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    chat.add_argument("--top-p", type=float, default=1.0)
    chat.add_argument("--seed", type=int)
    chat.add_argument(
        "--attention", default="full", metavar="HOW", help="full (default), window:4096 or select:32, of long chats"
    )
    chat.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    chat.set_defaults(run=_chat)
    serve = commands.add_parser("serve", help="a model behind OpenAI's HTTP API, with sessions and cache control")
    _add_arguments(serve, words, "serve")
    serve.set_defaults(run=_serve)
    bench = commands.add_parser("bench", help="measure, each figure beside a limit or a peer from the same run")
    names = bench.add_subparsers(required=True, metavar="NAME")
    for name, what in BENCHES.items():
        one = names.add_parser(name, help=what)
        _add_arguments(one, words, "bench", name)
        one.add_argument("--json", action="store_true", help="one JSON object instead of a table")
        one.add_argument("--out", metavar="FILE", help="also keep the JSON object in this file")
        one.set_defaults(run=_bench, bench=name)
    store = commands.add_parser("store", help="check, repair, slim or copy a store that nobody has open")
    _add_arguments(store, words, "store")
    replay = commands.add_parser("replay", help="what each eviction policy would have hit on a recorded trace")
    _add_arguments(replay, words, "replay", module="replay.command")
    doctor = commands.add_parser("doctor", help="what this machine has, and what each missing thing costs")
    doctor.add_argument("--path", default=".", metavar="PATH", help="where a store would be")
    doctor.add_argument(
        "--tune",
        action="store_true",
        help="measure how the kernels are best cut on this device and what suits the disk at PATH, and keep it",
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, words: Sequence[str], *command: str, module: str = "") -> None:
    """Those that the command's module adds, when it is this command that was given."""
    if tuple(words[: len(command)]) == command:
        import_module(f"{__package__}.{module or '.'.join(command)}").add_arguments(parser)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from .chat import run_chat

    return run_chat(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from .serve import run_serve

    return run_serve(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import harness

    rows = import_module(f"{__package__}.bench.{arguments.bench}").run(arguments)
    result = harness.report(arguments.bench, rows)
    if arguments.out:
        harness.save(result, Path(arguments.out))
    if arguments.json:
        print(json.dumps(result))
    else:
        harness.show(result)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import run_doctor

    return run_doctor(arguments)


if __name__ == "__main__":
    sys.exit(main())
