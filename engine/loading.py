"""Loading a local Hugging Face checkpoint, with errors that say in one line what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tiers.errors import ConfigError, UnsupportedModelError

DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_checkpoint(path: str, dtype: str, device: str | None = None) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer (None when the checkpoint has none). Reads local files only.

    Raises: ConfigError (no checkpoint there, unknown dtype), UnsupportedModelError (no causal language model).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = Path(path)
    if not (where / "config.json").is_file():
        raise ConfigError(f"model path {path!r} holds no config.json; give the directory of a saved checkpoint")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; choose {', '.join(DTYPES)}")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=dtype).eval()
    except ValueError as error:
        raise UnsupportedModelError(f"model path {path!r}: {_first_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"model path {path!r} cannot be loaded: {_first_line(error)}") from error
    if device is not None:
        model = model.to(device)
    if not any((where / name).exists() for name in _TOKENIZER_FILES):
        return model, None
    try:
        return model, AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer in {path!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
