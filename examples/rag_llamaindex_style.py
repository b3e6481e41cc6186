"""The same in LlamaIndex: its query engine assembles the prompt, a custom LLM goes on from what is stored.

    pip install llama-index-core && python examples/rag_llamaindex_style.py [--store DIR]

Nothing is warmed here: what a question had to compute is stored after it, so the second question about a document (and
the next process) computes little more than itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from llama_index.core import PromptTemplate
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

sys.path.insert(0, str(Path(__file__).parent))
from small_model import KeywordIndex, build_model, build_tokenizer, load_documents

from kvtier import PrefixCache

PROMPT = PromptTemplate("You answer from the text only.\n\nContext: {context_str}\n\nQuestion: {query_str} Answer:")
QUESTIONS = [
    "How long does a loaf of bread bake in the oven ?",
    "Why is rice flour used for the baskets of bread ?",
    "How many samples of seeds does the archive keep ?",
    "How long do beans keep in the seed archive ?",
]


class KeywordRetriever(BaseRetriever):
    """BM25 over the texts, as a LlamaIndex retriever."""

    def __init__(self, texts: dict[str, str], k: int = 1) -> None:
        self._texts, self._index, self._k = texts, KeywordIndex(texts), k
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        names = self._index.search(query_bundle.query_str, self._k)
        return [NodeWithScore(node=TextNode(text=self._texts[name], id_=name), score=1.0) for name in names]


class CachedModel(CustomLLM):
    """A transformers model as a LlamaIndex LLM."""

    model: Any
    tokenizer: Any
    prefixes: Any
    max_new_tokens: int = 4
    num_prompt_tokens: int = 0
    num_prefilled_tokens: int = 0

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=8192, num_output=self.max_new_tokens, model_name="small")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        ids = self.tokenizer.encode(prompt, return_tensors="pt")
        n, past = self.prefixes.load(ids)
        self.num_prompt_tokens, self.num_prefilled_tokens = ids.shape[1], ids.shape[1] - n
        out = self.model.generate(
            ids,
            past_key_values=past,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
        )
        self.prefixes.store(ids, past)
        return CompletionResponse(text=self.tokenizer.decode(out[0, ids.shape[1] :]))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        yield self.complete(prompt, formatted, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="a directory that lasts; without it, one that does not")
    arguments = parser.parse_args()
    model = build_model()
    with tempfile.TemporaryDirectory() as folder, PrefixCache.open(arguments.store or folder, model) as cache:
        llm = CachedModel(model=model, tokenizer=build_tokenizer(), prefixes=cache)
        synthesizer = get_response_synthesizer(llm=llm, text_qa_template=PROMPT, response_mode="simple_summarize")
        engine = RetrieverQueryEngine(retriever=KeywordRetriever(load_documents()), response_synthesizer=synthesizer)
        for question in QUESTIONS:
            engine.query(question)
            print(f"{question:<52} prompt {llm.num_prompt_tokens:>4} tokens, prefilled {llm.num_prefilled_tokens:>4}")


if __name__ == "__main__":
    main()
