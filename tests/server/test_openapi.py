"""What OpenAPI says is what comes: schemathesis asks for everything, and nothing it sends makes a 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .running import WAIT_S, serving

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "allow_header_conformance",
)


def ask_for_everything(model, tokenizer, tmp_path, seed: int, seconds: int, examples: int) -> None:
    with serving(model, tokenizer, nvme_path=tmp_path / "store", max_context=96) as server:
        schema = server.http.get("/openapi.json").json()
        assert not [name for name in schema["components"]["schemas"] if "Validation" in name]
        command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", "--no-color"]
        options = ["--checks", ",".join(CHECKS), "--max-examples", examples, "--max-time", seconds, "--seed", seed]
        options += ["--request-timeout", WAIT_S, "--suppress-health-check", "too_slow"]  # a slow machine is no finding
        out = subprocess.run([str(a) for a in [*command, *options]], capture_output=True, text=True, cwd=tmp_path)
        assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]
        for session in server.http.get("/v1/sessions").json()["data"]:
            server.http.delete(f"/v1/sessions/{session['id']}")


def test_no_request_makes_a_5xx_and_every_answer_is_as_described(model, tokenizer, tmp_path, seed):
    ask_for_everything(model, tokenizer, tmp_path, seed, seconds=8, examples=4)


@pytest.mark.soak
def test_for_longer_too(model, tokenizer, tmp_path, seed):
    ask_for_everything(model, tokenizer, tmp_path, seed, seconds=120, examples=100)
