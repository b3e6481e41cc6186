"""Clients that come, read along, cancel and vanish at random: nothing leaks, nothing hangs, nobody waits for ever."""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from collections import Counter

import pytest

from kvtier import SamplingParams
from kvtier.engine.conversations import Conversations
from kvtier.engine.loop import EngineLoop
from kvtier.engine.scheduler import SchedulerLimits
from kvtier.tiers.errors import Busy, ConfigError

from .test_families import tiny
from .test_loop import Heard
from .test_scheduler import check_end, open_engine, prompt_of

CLIENTS = 12
WAIT_S = 120.0  # bound of the wait for a first token, on a busy machine


def crowd(tmp_path, seconds: float, seed: int, turns: int = 0, clients: int = CLIENTS, **options) -> dict[str, float]:
    """Let clients at an engine for so long, and until there were so many turns. `options` are those of the loop.

    Says how many turns there were, how many met what, p99 of waiting in the queue and for the first token, and memory at
    both ends.
    """
    limits = SchedulerLimits(quantum_s=0.1, aging_s=1.0)
    engine = open_engine(tiny("llama"), 30, limits=limits, nvme_path=tmp_path / "s", nvme_bytes="128MiB")
    loop = EngineLoop(engine, **options)
    chats = Conversations(loop, idle_s=0.5)
    over, waits, queued, failed = threading.Event(), [], [], []
    sizes: list[int] = []
    met: Counter[str] = Counter()
    left: list[Heard] = []  # by clients that vanished; emptied of those that have ended

    def client(number: int) -> None:
        choose = random.Random(seed * 1000 + number)
        while not over.is_set():
            try:
                try_one(choose, number)
            except Exception as error:  # nobody hears of a thread that ends
                failed.append(error)

    def try_one(choose: random.Random, number: int) -> None:
        try:
            try:
                waits.append(one_of(choose, number))
            except ConfigError as error:
                if "longer than all tiers" not in str(error):
                    raise
                for one in chats.list_sessions():  # it has grown for long enough
                    if one.id.startswith(f"c{number}-") and one.state != "busy":
                        chats.delete(one.id)
        except Busy:
            met["refused"] += 1
            time.sleep(choose.random())  # as it is told to

    def one_of(choose: random.Random, number: int) -> float:
        params = SamplingParams(max_tokens=choose.randrange(0, 30), temperature=choose.choice([0.0, 1.0]))
        prompt, heard = prompt_of(choose.randrange(1, 200), choose.randrange(40)), Heard()
        started_s = time.monotonic()
        name, kind = f"c{number}-{choose.randrange(3)}", choose.random()
        if kind < 0.4:
            if all(one.id != name for one in chats.list_sessions()):
                chats.create(name)
            going = chats.send(name, prompt[:40], params, heard)
        elif kind < 0.5:
            if any(one.id == name for one in chats.list_sessions()):
                choose.choice([chats.park, chats.delete, chats.resume])(name)
            return 0.0
        else:
            going = loop.submit(prompt, params, heard, timeout_s=choose.choice([None, 5.0]))
        if kind >= 0.5 and choose.random() < 0.1:  # nobody reads on, nobody cancels
            met["vanished"] += 1
            left[:] = [one for one in left if len(one.ends) < 1] + [heard]
            return 0.0
        if choose.random() < 0.3:
            time.sleep(choose.random() * 0.05)
            going.cancel()
        heard.wait()  # or the test fails: nobody hangs
        reason, error = heard.ends[0]
        met[reason] += 1
        if error is not None:
            failed.append(error)
        met["preempted"] += going.first.num_preempted > 0
        queued.append(going.first.ledger.to_dict().get("queued", 0.0))
        met["queued"] += queued[-1] > 0
        return (going.first.usage.ttft_s or 0.0) if going.first.output.token_ids else time.monotonic() - started_s

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + seconds
    while (
        time.monotonic() < end_s
        or len(sizes) < 3  # to compare its thirds
        or (len(waits) < turns and time.monotonic() < end_s + 2 * WAIT_S)
    ):
        time.sleep(min(1.0, seconds / 10))
        sizes.append(resident_bytes())
    over.set()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a client hangs"
    for heard in left:
        heard.wait()  # what nobody waited for has ended, too
    assert chats.park_all() == 0
    chats.close()  # while it parks what is idle, a delete may be refused
    for one in chats.list_sessions():
        chats.delete(one.id)
    loop.close()
    check_end(engine)
    engine.close()
    assert not failed, failed[:3]
    waits.sort()
    queued.sort()
    third = len(sizes) // 3
    return {
        **met,
        "turns": len(waits),
        "p99_s": waits[int(0.99 * (len(waits) - 1))],
        "queued_p99_s": queued[int(0.99 * (len(queued) - 1))],
        "early_bytes": max(sizes[third : 2 * third]),
        "late_bytes": max(sizes[2 * third :]),
    }


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_crowd_leaves_nothing_behind(tmp_path, seed=0):
    found = crowd(tmp_path, 3.0, seed, turns=60)
    assert found["turns"] >= 60 and found["p99_s"] < WAIT_S, found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_crowd_for_half_an_hour(tmp_path, capsys):
    """More clients than the device tier and the queue hold: every kind of bad luck has to come, and to be survived."""
    seconds = float(os.environ.get("KVTIER_SOAK_S", "1800"))
    found = crowd(tmp_path, seconds, 1, clients=64, max_waiting=40)
    with capsys.disabled():
        print(found)
    for what in ("queued", "preempted", "refused", "cancelled", "deadline", "vanished", "length"):
        assert found.get(what, 0) > 0, f"nobody met: {what}; {found}"
    assert found["p99_s"] < WAIT_S and found["queued_p99_s"] < WAIT_S, found
    assert found["late_bytes"] < 1.05 * found["early_bytes"], found
