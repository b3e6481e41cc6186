"""`kvtier serve`: a local checkpoint, or the built-in needle model, behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path
from typing import Any

from ..tiers.errors import ConfigError
from .format_flags import add_format_flags, given_formats

SIZES = {"device_bytes": "256MiB", "host_bytes": "1GiB"}  # where neither flag, environment nor file says another
NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Without loading anything: every `kvtier` command reads this."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PATH", help="directory of a saved checkpoint with its tokenizer")
    what.add_argument("--needle", action="store_true", help="the built-in needle model: no download, answers by recall")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="as clients call it (default: the directory's name)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; any other address needs --api-keys")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one and says which")
    parser.add_argument("--api-keys", metavar="FILE", help='TOML file of lines "KEY" = "namespace"')
    parser.add_argument("--store", metavar="PATH", help="directory of the Zarr store (default: none, nothing survives)")
    parser.add_argument(
        "--pager",
        metavar="ADDRESS",
        help="unix:///... or tls://host:port of a pagerd to share blocks with others through",
    )
    parser.add_argument(
        "--transfer",
        choices=("client", "ipc"),
        help="who copies between our device memory and a pagerd's: we (default), or with ipc the pagerd, where it may",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file of the pager's settings, such as pagerd's; flags and KVTIER_... are stronger",
    )
    parser.add_argument("--device-bytes", metavar="SIZE", help=f"default {SIZES['device_bytes']}")
    parser.add_argument("--host-bytes", metavar="SIZE", help=f"default {SIZES['host_bytes']}")
    parser.add_argument(
        "--nvme-bytes", metavar="SIZE", help="most that the store may take (default 80%% of the free disk)"
    )
    add_format_flags(parser)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per block (default: the store's, or by device)"
    )
    parser.add_argument(
        "--attention",
        default="full",
        metavar="HOW",
        help="of requests that name none: full (default), window:TOKENS or select:PAGES",
    )
    parser.add_argument("--device", help="cpu or cuda (default: where the checkpoint is loaded)")
    parser.add_argument(
        "--max-context", type=int, metavar="N", help="tokens of prompt and answer (default: the model's)"
    )
    parser.add_argument(
        "--max-concurrency", type=int, default=256, metavar="N", help="requests at a time (default 256)"
    )
    parser.add_argument("--max-request-bytes", type=int, default=16 << 20, metavar="N", help="default 16 MiB")
    parser.add_argument("--request-timeout", type=float, metavar="S", help="longest time of a request (default: none)")
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="time to finish after SIGTERM (default 30)"
    )
    parser.add_argument(
        "--idle", type=float, default=300.0, metavar="S", help="park a session unused so long (default 300)"
    )
    parser.add_argument(
        "--otel", action="store_true", help="OpenTelemetry spans of requests, to the provider that this process has set"
    )
    parser.add_argument("--keep-alive", type=float, default=5.0, metavar="S", help="between signs of life (default 5)")


def run_serve(arguments: argparse.Namespace) -> int:
    """Returns 0 after SIGTERM. Raises ConfigError for what cannot be used, before a model is loaded where possible."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed; the server needs: pip install 'kvtier[serve]'")
    from ..engine.tracing import check_tracing, trace_requests

    if arguments.otel:
        check_tracing()
    from kvtier import Engine

    from ..engine.server.run import run_server
    from ..engine.server.settings import ServerSettings, check_exposure, load_api_keys
    from ..pager.config import load_config

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    name = arguments.served_model_name or ("needle" if arguments.needle else Path(arguments.model).resolve().name)
    settings = ServerSettings(
        model_name=name,
        max_context=arguments.max_context,
        max_concurrency=arguments.max_concurrency,
        max_request_bytes=arguments.max_request_bytes,
        request_timeout_s=arguments.request_timeout,
        drain_s=arguments.drain,
        idle_s=arguments.idle,
        keep_alive_s=arguments.keep_alive,
        api_keys={} if arguments.api_keys is None else load_api_keys(arguments.api_keys),
    )
    check_exposure(arguments.host, settings)
    config = load_config(
        arguments.config,
        defaults=SIZES,
        device_bytes=arguments.device_bytes,
        host_bytes=arguments.host_bytes,
        nvme_path=arguments.store,
        nvme_bytes=arguments.nvme_bytes,
        transfer=arguments.transfer,
        **given_formats(arguments),
    )
    model, tokenizer = _load(arguments)
    if tokenizer is None:
        raise ConfigError(f"--model {arguments.model!r} has no tokenizer; a server needs one saved beside the weights")
    with Engine.from_model(
        model,
        config,
        tokenizer,
        block_size=arguments.block_size,
        attention=arguments.attention,
        pager=arguments.pager,
    ) as engine:
        if arguments.otel:
            trace_requests(engine)
        return run_server(engine, settings, arguments.host, arguments.port)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    if not arguments.needle:
        from ..engine.loading import load_checkpoint

        return load_checkpoint(arguments.model, arguments.dtype, arguments.device)
    from ..engine.needle import build_needle_model
    from ..engine.needle_tokenizer import needle_tokenizer

    return build_needle_model(), needle_tokenizer()
