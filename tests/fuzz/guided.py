"""Frames under atheris:    python tests/fuzz/guided.py [-max_total_time=SECONDS]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import atheris

with atheris.instrument_imports(include=["kvtier.pager.protocol", "kvtier.pager.wire"]):
    from kvtier.pager.protocol import read_frame
    from kvtier.pager.wire import frames, messages

from targets import Received

from kvtier.tiers.errors import ProtocolError


def one(raw: bytes) -> None:
    """As a frame of the status socket, and as one of pagerd's."""
    for read in (read_status, read_request):
        try:
            read(raw)
        except (ProtocolError, EOFError):
            pass


def read_status(raw: bytes) -> None:
    read_frame(Received(raw))  # type: ignore[arg-type]


def read_request(raw: bytes) -> None:
    if len(raw) < frames.HEADER.size:
        return
    header, body = frames.parse_header(raw), memoryview(raw)[frames.HEADER.size :]
    if header.is_raw:
        if len(body) < frames.META_LENGTH.size:
            return
        body = body[frames.META_LENGTH.size :][: frames.meta_bytes(header, body)]
    if (kind := messages.REQUEST_BY_KIND.get(header.kind)) is not None:
        messages.from_fields(kind, frames.unpack(body))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
