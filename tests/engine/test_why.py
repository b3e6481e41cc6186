"""`why`: the lines of a request's time to first token add up, copies that ran beside computing included."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.pager.inspection.asking import RefusedError, Target
from kvtier.pager.inspection.observer import RequestRecord
from kvtier.pager.inspection.requests import _lines, _union_s
from kvtier.tools.inspect import answers
from kvtier.tools.inspect.text import Style

from .test_engine import open_engine
from .test_families import prompts, tiny


def record(lines_s: dict[str, float], copies_s: dict[str, float]) -> RequestRecord:
    return RequestRecord(1, "", "default", None, 0.0, "length", lines_s, {}, copies_s)


@pytest.mark.parametrize(
    ("wait_s", "copies_s", "wanted"),
    [
        (0.5, {}, {"waiting for room": 0.5}),
        (0.5, {"host_to_device": 0.2}, {"host > device": 0.2, "waiting for room": 0.3}),
        (
            0.5,
            {"nvme_to_host": 0.4, "host_to_device": 0.3},
            {"nvme > host": 0.4, "host > device": 0.3, "hidden behind compute": -0.2},
        ),
        (0.0, {"host_to_device": 0.3}, {"host > device": 0.3, "hidden behind compute": -0.3}),
    ],
)
def test_a_wait_is_split_by_copies_and_still_sums(wait_s, copies_s, wanted):
    lines_s = {"queued": 0.1, "wait_for_blocks": wait_s, "prefill": 1.0, "unexplained": 0.01, "ttft_s": wait_s + 1.11}
    told = {name: seconds for name, seconds, _ in _lines(record(lines_s, copies_s))}
    assert sum(told.values()) == pytest.approx(lines_s["ttft_s"])
    assert {name: told.get(name, 0.0) for name in wanted} == pytest.approx(wanted)
    assert "wait_for_blocks" not in told and ("waiting for room" in told) == ("waiting for room" in wanted)


def test_copies_at_the_same_time_count_once():
    assert _union_s([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (3.2, 3.3)]) == pytest.approx(3.0)
    assert _union_s([]) == 0.0


def test_a_real_request_is_told_line_by_line_and_nothing_is_unexplained(tmp_path):
    with open_engine(tiny("llama"), 14, status_socket=str(tmp_path / "sock")) as engine:
        target = Target.find(str(tmp_path / "sock"), timeout_s=60.0)
        assert target.ask("why")["requests"] == []
        session = engine.session("a")
        session.send(prompts()[3], SamplingParams(max_tokens=1))
        engine.generate(prompts(), SamplingParams(max_tokens=3))
        usage = session.send([5, 6], SamplingParams(max_tokens=2)).usage
        (told,) = target.ask("why")["requests"]
        assert (
            told["session"] is None and told["namespace"] == "default" and told["ttft_s"] == pytest.approx(usage.ttft_s)
        )
        lines = {line["line"]: line["seconds"] for line in told["lines"]}
        assert sum(lines.values()) == pytest.approx(told["ttft_s"])
        assert lines["unexplained"] <= told["ttft_s"]  # how little it is: test_engine.py; a busy machine has gaps
        assert lines["host > device"] > 0 and any("bytes" in line["note"] for line in told["lines"])
        assert told["usage"]["cached_tokens"] == usage.cached_tokens > 0
        everyone = target.ask("why", slowest=100)
        assert everyone["remembered"] == len(everyone["requests"]) == 2 + len(prompts())
        ttfts = [request["ttft_s"] for request in everyone["requests"]]
        assert ttfts == sorted(ttfts, reverse=True)
        assert target.ask("why", request=told["name"])["requests"][0]["number"] == told["number"]
        with pytest.raises(RefusedError, match="is not among the last"):
            target.ask("why", request="req-99999")
        session.park()
        engine.session("a").send([7], SamplingParams(max_tokens=1))
        assert target.ask("why")["requests"][0]["session"] == "a"  # known to the pager since it was parked
        screen = list(answers.why({"requests": [told]}, Style()))
        assert screen[0].startswith(told["name"]) and "<- largest" in "\n".join(screen) and "sum" in screen[-1]


def test_a_cancelled_request_is_remembered_with_its_outcome(tmp_path):
    with open_engine(tiny("llama"), status_socket=str(tmp_path / "sock")) as engine:
        request = engine.request(prompts()[2], SamplingParams(max_tokens=4))
        request.name = "mine"
        engine.scheduler.add(request)
        request.is_cancelled = True
        engine.step()
        (told,) = Target.find(str(tmp_path / "sock"), timeout_s=60.0).ask("why", request="mine")["requests"]
        assert told["outcome"] == "cancelled"
        assert sum(line["seconds"] for line in told["lines"]) == pytest.approx(told["ttft_s"])
