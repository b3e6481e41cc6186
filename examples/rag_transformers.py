"""Questions about local documents with plain transformers: the second process computes the questions and nothing else.

    python examples/rag_transformers.py [--store DIR]

Without --store it answers on a new store, lets a second process answer the same on it, and compares the two. The lines that
a pipeline needs are marked with `# kvtier`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_model import KeywordIndex, build_model, build_tokenizer, load_documents

from kvtier import PrefixCache  # kvtier

INSTRUCTIONS = "You answer from the text only.\n\n"
QUESTIONS = [
    "How long does a loaf bake and when is it sold ?",
    "How long was the time that nobody could land on the lighthouse ?",
    "What does a ticket of the tramway cost and what is the fine ?",
    "How long do beans keep in the seed archive ?",
    "Which brakes does a tramway car carry on the hill ?",
    "Why is rice flour used for the baskets of bread ?",
]
DOCUMENTS_PER_QUESTION, NEW_TOKENS = 2, 4


@torch.inference_mode()
def answer_all(store: str) -> dict[str, float]:
    """Answer every question; returns tokens, seconds and the median time to first token."""
    documents, tokenizer, model = load_documents(), build_tokenizer(), build_model()
    index = KeywordIndex(documents)
    model(torch.tensor([[1, 2, 3]]))  # the first call of a process is slow whatever it computes
    tokens = {name: tokenizer.encode(text + "\n\n") for name, text in documents.items()}
    start, ttfts_s, prompt_tokens, prefilled, prefilled_of_documents = time.perf_counter(), [], 0, 0, 0

    cache = PrefixCache.open(store, model)  # kvtier
    for question in QUESTIONS:
        asked_s = time.perf_counter()
        found = sorted(index.search(question, DOCUMENTS_PER_QUESTION))  # in a fixed order, so that pairs are shared too
        context = tokenizer.encode(INSTRUCTIONS) + [t for name in found for t in tokens[name]]
        ids = context + tokenizer.encode(f"Question: {question} Answer:")

        n, past = cache.load(ids)  # kvtier
        logits = model(torch.tensor([ids[n:]]), past_key_values=past, logits_to_keep=1).logits  # kvtier: ids[n:]
        ttfts_s.append(time.perf_counter() - asked_s)
        answer = [int(logits[0, -1].argmax())]
        while len(answer) < NEW_TOKENS:
            answer.append(int(model(torch.tensor([answer[-1:]]), past_key_values=past).logits[0, -1].argmax()))
        cache.store(ids[: len(context)], past)  # kvtier: the documents; a past may hold more than is named

        prompt_tokens, prefilled = prompt_tokens + len(ids), prefilled + len(ids) - n
        prefilled_of_documents += max(0, len(context) - n)
    cache.close()  # kvtier
    return {
        "prompt_tokens": prompt_tokens,
        "prefilled_tokens": prefilled,
        "prefilled_document_tokens": prefilled_of_documents,
        "seconds": time.perf_counter() - start,
        "median_ttft_s": statistics.median(ttfts_s),
        "first_ttft_s": ttfts_s[0],
    }


def run_in_a_process(store: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--store", store]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="answer once, with this store, and print the figures as JSON")
    arguments = parser.parse_args()
    if arguments.store:
        print(json.dumps(answer_all(arguments.store)))
        return
    with tempfile.TemporaryDirectory() as store:
        first, second = answer_all(store), run_in_a_process(store)
    print(f"{len(QUESTIONS)} questions, {first['prompt_tokens']} tokens of prompts     first process   second process")
    for name in ("prefilled_tokens", "prefilled_document_tokens"):
        print(f"{name:<42}{first[name]:>14}{second[name]:>17}")
    for name in ("seconds", "first_ttft_s", "median_ttft_s"):
        print(f"{name:<42}{first[name]:>14.3f}{second[name]:>17.3f}")
    print(
        f"time to the first token of the first answer: {first['first_ttft_s'] / second['first_ttft_s']:.1f} times faster"
    )


if __name__ == "__main__":
    main()
