"""What the examples share, so that they run without a download: a Llama with random weights, a tokenizer of words, texts.

With random weights the answers mean nothing; what the examples show is what is computed and what is not. In your own
pipeline these are `AutoModelForCausalLM.from_pretrained(...)` and its tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOCUMENTS = Path(__file__).parent / "documents"
_MORE_WORDS = "You answer from the text only. Question: Answer: Context: What How Why Which Who When is does ?"


def load_documents() -> dict[str, str]:
    """The texts beside this file, by name."""
    return {path.stem: path.read_text() for path in sorted(DOCUMENTS.glob("*.txt"))}


def build_model() -> Any:
    """The same 12 M parameters in every process; 9 KiB of K/V per token."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small gains nothing from two, and loses much where others compute too
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def build_tokenizer() -> Any:
    """One token per word or mark. A text's tokens do not depend on what follows it, as reuse of prefixes needs."""
    text = " ".join([*load_documents().values(), _MORE_WORDS])
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


class KeywordIndex:
    """BM25 over whole documents. Source: Robertson and Zaragoza, The Probabilistic Relevance Framework (2009)."""

    def __init__(self, documents: dict[str, str], k1: float = 1.5, b: float = 0.75) -> None:
        self._counts = {name: Counter(_terms(text)) for name, text in documents.items()}
        self._k1, self._b = k1, b
        self._mean = sum(c.total() for c in self._counts.values()) / len(documents)

    def search(self, query: str, k: int) -> list[str]:
        """Names of the k documents that fit best, best first."""
        terms = set(_terms(query))
        return sorted(self._counts, key=lambda name: (-sum(self._score(name, t) for t in terms), name))[:k]

    def _score(self, name: str, term: str) -> float:
        counts, holders = self._counts[name], sum(term in c for c in self._counts.values())
        rarity = math.log(1 + (len(self._counts) - holders + 0.5) / (holders + 0.5))
        length = 1 - self._b + self._b * counts.total() / self._mean
        return rarity * counts[term] * (self._k1 + 1) / (counts[term] + self._k1 * length)


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
