"""The same in LangChain: a retriever, a prompt and a chain as always; only the model behind them remembers documents.

    pip install langchain-core && python examples/rag_langchain_style.py [--store DIR]

Documents are computed when they are indexed (`warm`), so that the first question already finds them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models.llms import LLM
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough

sys.path.insert(0, str(Path(__file__).parent))
from small_model import KeywordIndex, build_model, build_tokenizer, load_documents

from kvtier import PrefixCache

BEFORE_QUESTION = "You answer from the text only.\n\nContext: {context}\n\n"
PROMPT = PromptTemplate.from_template(BEFORE_QUESTION + "Question: {question} Answer:")
QUESTIONS = [
    "How long does a loaf of bread bake in the oven ?",
    "What is the flash of the lighthouse ?",
    "How much water and salt does the dough need ?",
    "Which brakes does a car of the tramway carry ?",
]


class KeywordRetriever(BaseRetriever):
    """BM25 over the texts, as a LangChain retriever."""

    texts: dict[str, str]
    index: Any
    k: int = 1

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        names = self.index.search(query, self.k)
        return [Document(page_content=self.texts[name], metadata={"name": name}) for name in names]


class CachedModel(LLM):
    """A transformers model as a LangChain LLM; prompts go on from the longest prefix that is stored."""

    model: Any
    tokenizer: Any
    prefixes: Any
    max_new_tokens: int = 4
    num_prompt_tokens: int = 0
    num_prefilled_tokens: int = 0

    @property
    def _llm_type(self) -> str:
        return "kvtier"

    def _call(self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> str:
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
        return self.tokenizer.decode(out[0, ids.shape[1] :])


def together(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="a directory that lasts; without it, one that does not")
    arguments = parser.parse_args()
    texts, model, tokenizer = load_documents(), build_model(), build_tokenizer()
    with tempfile.TemporaryDirectory() as folder, PrefixCache.open(arguments.store or folder, model) as cache:
        prefixes = [tokenizer.encode(BEFORE_QUESTION.format(context=text)) for text in texts.values()]
        warmed = cache.warm(prefixes)
        print(f"indexed {warmed.num_documents} documents of {warmed.tokens} tokens: {warmed.computed_tokens} computed")

        llm = CachedModel(model=model, tokenizer=tokenizer, prefixes=cache)
        retriever = KeywordRetriever(texts=texts, index=KeywordIndex(texts))
        chain = {"context": retriever | together, "question": RunnablePassthrough()} | PROMPT | llm | StrOutputParser()
        for question in QUESTIONS:
            chain.invoke(question)
            asked = len(tokenizer.encode(f"Question: {question} Answer:"))
            of_documents = max(0, llm.num_prefilled_tokens - asked)
            print(
                f"{question:<52} prompt {llm.num_prompt_tokens:>4} tokens, prefilled {llm.num_prefilled_tokens:>3}, "
                f"of documents {of_documents}"
            )


if __name__ == "__main__":
    main()
