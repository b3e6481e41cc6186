"""From requests as token ids to the replay format: blocks get the pager's own keys, shortened to 63 bits.

The input is one JSON object per line: `tokens` (a list of token ids) or `prompt` (a text, of which UTF-8 bytes are taken
as tokens), and, where known, `timestamp` (ms), `output_length`, `namespace`. Nothing of the text can be had back.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from ...pager.keys import KeyChain
from ...tiers.errors import ConfigError
from .trace import number_of


def convert(source: Path, target: Path, block_tokens: int) -> int:
    """Returns requests written. Raises: ConfigError naming the line."""
    if block_tokens < 1:
        raise ConfigError(f"--block-size {block_tokens}: must be at least 1 token")
    chains: dict[str, KeyChain] = {}
    try:
        lines = source.read_text().split("\n")  # other ends of lines may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(source)!r} cannot be read: {error}") from error
    written = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            written.append(json.dumps(_converted(line, f"{str(source)!r} line {number}", block_tokens, chains)))
    text = "".join(f"{line}\n" for line in written).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)
    return len(written)


def _converted(line: str, where: str, size: int, chains: dict[str, KeyChain]) -> dict[str, Any]:
    try:
        one = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    tokens = _tokens(one, where)
    namespace = str(one.get("namespace", "default"))
    chain = chains.setdefault(namespace, KeyChain("replay", namespace, b"", size))
    keys: list[bytes] = []
    chain.extend(keys, tokens[: len(tokens) // size * size])
    if len(tokens) % size:
        keys.append(chain.seal(keys[-1] if keys else None, tokens[len(tokens) // size * size :]))
    made: dict[str, Any] = {"input_length": len(tokens), "output_length": number_of(one, "output_length", 0, where)}
    if one.get("timestamp") is not None:
        made["timestamp"] = number_of(one, "timestamp", 0, where)
    return made | {"hash_ids": [int.from_bytes(key[:8], "big") >> 1 for key in keys]}


def _tokens(one: Any, where: str) -> list[int]:
    if isinstance(one, dict) and isinstance(one.get("prompt"), str):
        return list(one["prompt"].encode())
    tokens = one.get("tokens") if isinstance(one, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(t, int) and 0 <= t < 1 << 32 for t in tokens):
        raise ConfigError(f"{where}: give tokens=[ids] or prompt=text")
    return tokens
