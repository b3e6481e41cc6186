"""The flags that say how many bits a tier keeps, the same for `kvtier demo`, `chat` and `serve`. Nothing else lives here.

They are the settings device, host and nvme of the configuration; `--host` is an address to a server, hence the longer names.
"""

from __future__ import annotations

import argparse
from typing import Any


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """Without loading anything."""
    parser.add_argument(
        "--device-format",
        metavar="FORMAT",
        help="how the device tier keeps whole blocks, and the tiers below with it: full (default), fp8, int8, int4, int2, "
        "'int4/128', also 'int4; layers 0-1: bf16; heads 0: int8'",
    )
    parser.add_argument(
        "--residual",
        type=int,
        metavar="N",
        help="newest tokens that a packed device tier keeps in full precision too, beside the block being filled (default 0)",
    )
    parser.add_argument(
        "--host-format",
        metavar="FORMAT",
        help="how the host tier keeps whole blocks: full (default), fp8, int8, int4, int2, also 'int8; layers 0-1: full'",
    )
    parser.add_argument(
        "--nvme-format", metavar="FORMAT", help="how the store keeps them (default: as the host tier), e.g. int4"
    )


def given_formats(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    said = {
        "device": arguments.device_format,
        "residual": arguments.residual,
        "host": arguments.host_format,
        "nvme": arguments.nvme_format,
    }
    return {name: value for name, value in said.items() if value is not None}
