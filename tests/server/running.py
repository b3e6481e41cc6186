"""A server over a tiny model in this process, spoken to over real HTTP; and `kvtier serve` as a process of its own."""

from __future__ import annotations

import asyncio
import copy
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import torch
import transformers as T
import uvicorn

from kvtier import Engine, PagerConfig
from kvtier.engine.hf import discover
from kvtier.engine.server.app import make_app
from kvtier.engine.server.run import _listen, _Server
from kvtier.engine.server.service import Service
from kvtier.engine.server.settings import ServerSettings

from .. import warm
from ..tools.test_chat import make_tokenizer, small_model

BLOCK = 16
WAIT_S = 240.0  # for an answer: a bound on hanging, not an aim
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def tiny_model(tokenizer):
    model = small_model("llama", tokenizer, max_positions=4096)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0  # answers go on: their length is the test's choice
    return model


@torch.inference_mode()
def stock(model, prompt: list[int], new_tokens: int) -> list[int]:
    """What transformers alone says, greedily, up to the end token."""
    cache, out, x = T.DynamicCache(config=model.config), [], torch.tensor([prompt])
    while len(out) < new_tokens and model.config.eos_token_id not in out:
        out.append(int(model(x, past_key_values=cache, use_cache=True).logits[0, -1].argmax()))
        x = torch.tensor([[out[-1]]])
    return out


class Running:
    """Clients for a server, and the service behind it where that is in this process."""

    def __init__(self, url: str, service: Service | None = None, model=None) -> None:
        self.url, self.service, self.model = url, service, model
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
        self.http = httpx.Client(base_url=url, timeout=WAIT_S)

    def with_key(self, key: str) -> tuple[openai.OpenAI, httpx.Client]:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)
        return client, httpx.Client(base_url=self.url, timeout=WAIT_S, headers={"Authorization": f"Bearer {key}"})

    @property
    def tokenizer(self):
        return self.service.tokenizer

    def encode_chat(self, *texts: str) -> list[int]:
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def stock_text(self, prompt: list[int], new_tokens: int) -> str:
        out = stock(self.model, prompt, new_tokens)
        return self.tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")

    def check_end(self) -> None:
        """Nobody is at work, nothing leaked, the books agree: what is held, sessions and pins hold."""
        deadline_s = time.monotonic() + WAIT_S
        while (left := self._left()) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert not left
        self.service.engine.pager.drain()
        self.service.engine.pager.check_integrity()

    def _left(self) -> list[str]:
        """What is not over. Looked at between two steps: only then do sessions and the pager agree."""

        def look(engine: Engine) -> list[str]:
            held = {one.session.current_seq for one in list(self.service.conversations._held.values())} - {None}
            held |= {pin.seq for pin in list(self.service.pins._pins.values())}
            found = [f"request {request}" for request in engine.scheduler.requests()]
            return found + [f"sequence {seq}" for seq in sorted(held ^ set(engine.pager._core.sequences))]

        inside = self.service.gate.num_inside
        return self.service.loop.call(look).result(WAIT_S) + [f"{inside} at work"] * bool(inside)


@contextmanager
def serving(
    model,
    tokenizer,
    *,
    blocks: int = 256,
    host: int = 512,
    nvme_path=None,
    block_size=BLOCK,
    is_expected_to_fail=False,
    **settings,
):
    size = sum(layout.block_bytes for layout in discover(model).layouts(block_size))
    config = PagerConfig(blocks * size, host * size, nvme_path=nvme_path, backend="cpu", staging_bytes=0)
    if nvme_path is not None:
        config = PagerConfig(blocks * size, host * size, nvme_path, 4096 * size, backend="cpu", staging_bytes=0)
    options = {"model_name": "tiny", "keep_alive_s": 0.2} | settings
    served = copy.deepcopy(model)  # while an engine has a model, it runs nowhere else
    with Engine.from_model(served, config, tokenizer, block_size=block_size, max_batch_tokens=64) as engine:
        service = Service(engine, ServerSettings(**options))
        listener = _listen("127.0.0.1", 0)
        server = _Server(uvicorn.Config(make_app(service), log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, model)
        try:
            while not server.started:
                time.sleep(0.01)
            yield running
            if not is_expected_to_fail:
                running.check_end()
        finally:
            running.client.close()
            running.http.close()
            service.close()
            server.should_exit = True
            thread.join(60)
            service.end_threads()
        assert is_expected_to_fail or service.loop.failure is None


@contextmanager
def serve_process(*arguments, expect_rc: int | None = 0, starts_cold: bool = False):
    """`kvtier serve --port 0 ...`; yields it once it listens. SIGTERM at the end, unless it has ended."""
    command = ["-m", "kvtier.tools.cli", "serve", "--port", "0", *[str(a) for a in arguments]]
    log = tempfile.NamedTemporaryFile()  # noqa: SIM115, nobody would read a pipe meanwhile
    if starts_cold:
        process = subprocess.Popen([sys.executable, *command], stderr=log, cwd="/")
    else:
        process = warm.heavy.start(*command, stderr=log, cwd="/")
    try:
        deadline_s = time.monotonic() + WAIT_S
        while not (found := re.search(r"on (http://[^ ,]+),", Path(log.name).read_text())):
            assert process.poll() is None and time.monotonic() < deadline_s, Path(log.name).read_text()
            time.sleep(0.01)
        running = Running(found[1])
        running.process = process
        yield running
        running.client.close()
        running.http.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        rc = process.wait(WAIT_S)
        assert expect_rc is None or rc == expect_rc, Path(log.name).read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(60)
        log.close()


def save_tiny(path: Path) -> None:
    tokenizer = make_tokenizer()
    tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
