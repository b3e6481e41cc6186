"""`pagerd`: checks and prints a pager's configuration. Serving other processes is not in this version."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from ..pager.config import load_config
from ..tiers.errors import KvTierError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pagerd", description="The offload daemon's configuration.")
    parser.add_argument("--config", metavar="FILE", help="TOML file")
    parser.add_argument("--check-config", action="store_true", help="say whether the configuration is good, and end")
    parser.add_argument("--print-config", action="store_true", help="print the configuration in force as JSON, and end")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check_config or arguments.print_config:
            config = load_config(arguments.config)
            text = (
                json.dumps(dataclasses.asdict(config), default=str, indent=1) if arguments.print_config else "config ok"
            )
            print(text)
            return 0
    except KvTierError as error:
        print(f"pagerd: error: {error}", file=sys.stderr)
        return 2
    print("pagerd: error: the daemon is not in this version; use the embedded Pager (see README)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
