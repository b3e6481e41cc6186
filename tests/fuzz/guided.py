"""Frames under atheris:    python tests/fuzz/guided.py [-max_total_time=SECONDS]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import atheris

with atheris.instrument_imports(include=["kvtier.pager.protocol"]):
    from kvtier.pager.protocol import read_frame

from targets import Received

from kvtier.tiers.errors import ProtocolError


def one(raw: bytes) -> None:
    try:
        read_frame(Received(raw))  # type: ignore[arg-type]
    except (ProtocolError, EOFError):
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
