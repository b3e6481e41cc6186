"""Documents in any order: each is computed once, alone, and used at whatever place a prompt gives it.

    python examples/rag_any_order.py [--recompute N]

A prefix cache finds what begins a prompt; the second document of one prompt is the first of another, and would be computed
for each place. `load_chunks` moves its keys instead. That is approximate: its tokens never saw the documents before them.
So this prints what it costs, against computing every prompt whole.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import permutations
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_model import build_model, build_tokenizer, load_documents

from kvtier import PrefixCache

QUESTION = "Question: How long does a loaf bake and when is it sold ? Answer:"
DOCUMENTS_PER_PROMPT, NUM_PROMPTS = 2, 6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recompute", type=int, default=16, metavar="N", help="first tokens of a document (default 16)"
    )
    recompute = parser.parse_args().recompute
    tokenizer, model = build_tokenizer(), build_model()
    texts = {name: tokenizer.encode(text + "\n\n") for name, text in load_documents().items()}
    question = tokenizer.encode(QUESTION)
    prompts = list(permutations(texts, DOCUMENTS_PER_PROMPT))[::2][:NUM_PROMPTS]
    model(torch.tensor([[1, 2, 3]]))  # the first call of a process is slow whatever it computes

    with tempfile.TemporaryDirectory() as store, PrefixCache.open(store, model) as cache:
        joined_s, whole_s = [], []
        for names in prompts:
            chunks = [texts[name] for name in names]
            started_s = time.perf_counter()
            n, past = cache.load_chunks(chunks, recompute_first=recompute)
            model(torch.tensor([question]), past_key_values=past, logits_to_keep=1)
            joined_s.append(time.perf_counter() - started_s)

            started_s = time.perf_counter()
            ids = [token for chunk in chunks for token in chunk] + question
            model(torch.tensor([ids]), logits_to_keep=1)
            whole_s.append(time.perf_counter() - started_s)
            assert n + len(question) == len(ids)
        computed = cache.stats()["stored_tokens"]
        print(f"{len(prompts)} prompts of {DOCUMENTS_PER_PROMPT} of {len(texts)} documents, in different orders")
        print(f"document tokens computed for storing: {computed} of {sum(map(len, texts.values()))}")
        print(
            f"time to the first token: {1e3 * statistics.median(joined_s):.0f} ms joined, "
            f"{1e3 * statistics.median(whole_s):.0f} ms whole"
        )
        chunks = [texts[name] for name in prompts[-1]]
        for first in sorted({0, recompute, max(map(len, chunks))}):
            print(f"recompute {first:>4}: {cache.chunk_error(chunks, question, recompute_first=first)}")


if __name__ == "__main__":
    main()
