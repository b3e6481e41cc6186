"""policy = "importance" in an engine: it is told what attention read, and the page that holds the answer stays for that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.mass import EVERY_TOKENS, StepMass
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.pager.pager import Pager

BLOCK, LENGTH = 64, 2048
BLOCK_BYTES = BLOCK * 2048


@pytest.fixture(scope="module")
def model() -> Any:
    return build_needle_model()


def asked(model: Any, policy: str, *, pages: int = 48) -> tuple[Engine, Any, int]:
    """An engine that has answered from a long prompt, and the block with the answer's needle in its last third."""
    config = PagerConfig(device_bytes=pages * BLOCK_BYTES, host_bytes=200 * BLOCK_BYTES, backend="cpu", policy=policy)
    engine = Engine.from_model(model, config, block_size=BLOCK)
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 8)
    needle = next(one for one in needles if one.position > 2 * LENGTH // 3)
    session = engine.session("asked")
    out = session.send([*ids, needle.key], SamplingParams(max_tokens=4))
    assert tuple(out.token_ids) == needle.values
    return engine, session, needle.position // BLOCK


def blocks_of(engine: Engine, session: Any) -> np.ndarray:
    return engine.pager._core.sequences[session.seq].tables[0].ids


@pytest.mark.parametrize("policy,stays", [("importance", True), ("lru", False)])
def test_the_needles_page_survives_because_of_its_mass(model, policy, stays):
    engine, session, place = asked(model, policy)
    with engine:
        group, blocks = engine.pager._core.groups[0], blocks_of(engine, session).copy()
        others, _ = needle_prompt(NeedleSpec(), 24 * BLOCK, 1, seed=9)
        engine.generate([others], SamplingParams(max_tokens=1))
        resident = group.directory.in_device(blocks)
        assert not resident.all() and bool(resident[place]) is stays


def test_without_being_told_importance_lets_the_needle_go(model, monkeypatch):
    monkeypatch.setattr(Pager, "weighs_mass", False)
    engine, session, place = asked(model, "importance")
    with engine:
        blocks = blocks_of(engine, session).copy()
        others, _ = needle_prompt(NeedleSpec(), 24 * BLOCK, 1, seed=9)
        engine.generate([others], SamplingParams(max_tokens=1))
        assert not engine.pager._core.groups[0].directory.in_device(blocks)[place]


def test_no_other_policy_pays_for_it(model, monkeypatch):
    monkeypatch.setattr(StepMass, "__init__", lambda *_: pytest.fail("sampled under another policy"))
    engine, _, _ = asked(model, "auto")
    engine.close()


def test_a_prompts_end_is_sampled_and_one_token_in_so_many(model, monkeypatch):
    ends: list[int] = []
    tell = StepMass.tell

    def told(self: StepMass, pager: Pager) -> None:
        ends.extend(self._lease.spans[i].end for i in self._spans.tolist())
        assert all(
            len(mass) == len(self._spans) and torch.allclose(mass.sum(1), torch.full((len(mass),), 2.0))
            for mass in self._sums.values()
        )  # two layers of mass 1
        tell(self, pager)

    monkeypatch.setattr(StepMass, "tell", told)
    engine, session, _ = asked(model, "importance")
    with engine:
        first = LENGTH + 1
        session.send([5], SamplingParams(max_tokens=3 * EVERY_TOKENS))
        assert ends[0] == first
        decoded = [end for end in ends[1:] if end % EVERY_TOKENS == 0]
        assert len(decoded) >= 3 and len(ends) <= len(decoded) + 2
