"""The examples run as programs, and what they print is what their first lines promise."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from .. import warm

pytestmark = pytest.mark.timeout(900)  # torch and a model, twice each: a bound on hanging, not an aim
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = warm.heavy.run(EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'kvtier[examples]'")


def test_every_example_is_tried_here():
    tried = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert tried == {path.name for path in EXAMPLES.glob("rag_*.py")}


def test_a_second_process_prefills_the_questions_and_nothing_else():
    said = run("rag_transformers.py")
    first, second = map(int, re.search(r"^prefilled_document_tokens\s+(\d+)\s+(\d+)$", said, re.M).groups())
    assert first > 1000 and second == 0
    assert "time to the first token" in said


def test_langchain_finds_documents_computed_when_they_were_indexed(tmp_path):
    needs("langchain_core")
    said = run("rag_langchain_style.py", "--store", str(tmp_path))
    assert re.search(r"indexed 4 documents of (\d+) tokens: \1 computed", said)
    assert re.findall(r"of documents (\d+)", said) == ["0"] * 4


def test_llamaindex_computes_a_document_once(tmp_path):
    needs("llama_index")
    said = run("rag_llamaindex_style.py", "--store", str(tmp_path))
    prefilled = [int(n) for n in re.findall(r"prefilled\s+(\d+)", said)]
    assert min(prefilled[0], prefilled[2]) > 400 and max(prefilled[1], prefilled[3]) < 50


def test_documents_in_any_order_are_computed_once_and_say_what_that_costs():
    said = run("rag_any_order.py", "--recompute", "8")
    assert re.search(r"computed for storing: (\d+) of \1\n", said)
    errors = re.findall(r"recompute +\d+: .* keys off by ([\d.]+) %, KL", said)
    assert len(errors) == 3 and float(errors[0]) > 0 and float(errors[2]) < 0.1  # recomputing everything is exact
