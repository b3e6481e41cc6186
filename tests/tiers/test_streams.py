"""One contract for every backend, and proof that the stand-ins show a forgotten wait."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtier.tiers import cpu
from kvtier.tiers.backends import cuda_missing, get_backend
from kvtier.tiers.cpu import CpuBackend, SharedJobs
from kvtier.tiers.errors import ConfigError
from kvtier.tiers.simulated import SimulatedBackend


class BackendContract:
    """What every backend promises. Subclasses provide `make`."""

    def make(self):
        raise NotImplementedError

    def test_rows_are_copied_by_index(self):
        backend = self.make()
        source, target = backend.alloc_host(8, 64), backend.alloc_device(8, 64)
        source[:] = np.arange(8)[:, None]
        t, s = np.array([0, 1, 5, 7]), np.array([3, 4, 5, 0])
        backend.promote.copy_rows(target, t, source, s)
        t[:] = s[:] = 2  # the caller's arrays are its own again
        assert backend.promote.record().wait(60)
        assert target[[0, 1, 5, 7], 0].tolist() == [3, 4, 5, 0] and not target[[2, 3, 4, 6]].any()
        backend.close(5)

    def test_column_slices_are_copied_too(self):
        backend = self.make()
        source, target = backend.alloc_host(4, 64), backend.alloc_device(4, 16)
        source[:] = np.arange(64)
        backend.promote.copy_rows(target, np.arange(2), source[:, 16:32], np.array([3, 1]))
        backend.promote.record().wait(60)
        assert target[0].tolist() == list(range(16, 32))
        backend.close(5)

    def test_a_stream_waits_for_an_event_of_another(self):
        backend = self.make()
        a, b, c = (backend.alloc_host(1, 1 << 16) for _ in range(3))
        for value in range(1, 20):
            a[:] = value
            one = np.zeros(1, np.int64)
            backend.promote.copy_rows(b, one, a, one)
            backend.demote.wait(backend.promote.record())
            backend.demote.copy_rows(c, one, b, one)
            assert backend.demote.record().wait(60)
            assert (c == value).all()
        backend.close(5)

    def test_shared_jobs_each_run_once_whoever_does_them(self):
        backend, seen = self.make(), []
        for number in range(50):
            event = backend.read_io.submit_shared([lambda i=i: seen.append(i) for i in range(number, number + 4)])
            assert event.wait(60) and event.is_done() and event.error is None
            assert sorted(seen[-4:]) == list(range(number, number + 4))
        bad = backend.read_io.submit_shared([lambda: seen.append(-1), lambda: [][0]])
        assert bad.wait(60) and isinstance(bad.error, IndexError) and seen[-1] == -1
        backend.close(5)

    def test_io_reports_its_errors_and_goes_on(self):
        backend, seen = self.make(), []
        bad = backend.read_io.submit(lambda: [][0])
        good = backend.read_io.submit(lambda: seen.append(1))
        assert bad.wait(60) and isinstance(bad.error, IndexError)
        assert good.wait(60) and good.error is None and seen == [1]
        backend.close(5)

    def test_steps_run_in_turn_and_one_that_fails_ends_its_own_work_only(self):
        backend, seen = self.make(), [[] for _ in range(100)]

        def steps(i: int):
            def step(number: int) -> None:
                seen[i].append(number)
                if i % 10 == 5 and number == i // 10 % 3:
                    raise OSError(f"step {number}")

            return lambda: step(0), lambda: step(1), lambda: step(2)

        events = [backend.write_io.submit_steps(steps(i)) for i in range(100)]
        assert all(event.wait(60) for event in events)
        for i, event in enumerate(events):
            failing = i // 10 % 3 if i % 10 == 5 else None
            assert seen[i] == list(range(3 if failing is None else failing + 1)), i
            assert event.error is None if failing is None else str(event.error) == f"step {failing}"
        assert not backend.write_io.has_backlog()
        backend.close(5)

    def test_memory_is_exact_and_page_aligned(self):
        backend = self.make()
        rows = backend.alloc_host(3, 100)
        assert rows.nbytes == 300 and rows.ctypes.data % 4096 == 0 and rows.flags.c_contiguous
        backend.close(5)


class TestCpuBackend(BackendContract):
    def make(self):
        return CpuBackend(poison=True, delay_s=0.001)

    def test_a_reader_that_does_not_wait_sees_poison(self, monkeypatch):
        """However late it is: the copy waits for it, half done."""
        backend, begun, go, whole = CpuBackend(poison=True), threading.Event(), threading.Event(), cpu.copy_rows_now

        def copy_late(*rows) -> None:
            begun.set()
            go.wait(60)
            whole(*rows)

        monkeypatch.setattr(cpu, "copy_rows_now", copy_late)
        source, target = backend.alloc_host(1, 64), backend.alloc_device(1, 64)
        source[:] = 7
        backend.promote.copy_rows(target, np.zeros(1, int), source, np.zeros(1, int))
        assert begun.wait(60) and (target == cpu.POISON).all()
        go.set()
        assert backend.promote.synchronize(60) and (target == 7).all()
        backend.close(5)

    def test_wait_any_returns_when_work_ends(self):
        backend = CpuBackend()
        event = backend.read_io.submit(lambda: None)
        for _ in range(200):
            if event.is_done():
                break
            backend.wait_any(0.05)
        assert event.is_done()
        backend.close(5)


class TestSimulatedBackend(BackendContract):
    def make(self):
        return SimulatedBackend(3)

    def test_same_seed_same_order(self):
        def trace(seed: int) -> list[int]:
            backend, seen = SimulatedBackend(seed), []
            for i in range(20):
                backend.read_io.submit(lambda i=i: seen.append(i))
            backend.close(5)
            return seen

        assert trace(1) == trace(1) != trace(2)

    @pytest.mark.parametrize("waits", [True, False])
    def test_about_half_the_seeds_show_a_missing_wait(self, waits):
        wrong = 0
        for seed in range(200):
            backend = SimulatedBackend(seed)
            host, device, seen = backend.alloc_host(1, 16), backend.alloc_device(1, 16), []
            host[:] = 7
            backend.promote.copy_rows(device, np.zeros(1, int), host, np.zeros(1, int))
            if waits:
                backend.compute.wait(backend.promote.record())
            backend.compute.run(lambda seen=seen, device=device: seen.append(int(device[0, 0])))
            backend.close(5)
            wrong += seen != [7]
        assert wrong == 0 if waits else wrong > 40

    def test_failures_can_be_planted(self):
        backend = SimulatedBackend(0)
        rows = backend.alloc_host(1, 16)
        backend.fail_next("promote", OSError("planted"))
        backend.promote.copy_rows(rows, np.zeros(1, int), rows, np.zeros(1, int))
        event = backend.promote.record()
        assert event.wait() and isinstance(event.error, OSError)


def test_backends_are_chosen_by_name():
    assert get_backend("cpu").name == "cpu"
    with pytest.raises(ConfigError, match="tpu"):
        get_backend("tpu")


@pytest.mark.skipif(cuda_missing() is None, reason="there is a CUDA device here")
def test_cuda_without_cuda_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"kvtier\[cuda\]"):
        get_backend("cuda")


def test_shared_jobs_need_no_waiter_and_no_free_worker():
    backend, gate, seen = CpuBackend(io_depth=1), threading.Event(), []
    unasked = backend.read_io.submit_shared([lambda i=i: seen.append(i) for i in range(3)])
    while not unasked.is_done():
        backend.wait_any(10)
    assert sorted(seen) == [0, 1, 2]
    blocked = backend.read_io.submit(lambda: gate.wait(60))
    assert backend.read_io.submit_shared([lambda: seen.append(3)]).wait(60) and seen[-1] == 3
    gate.set()
    assert blocked.wait(60)
    backend.close(5)


def test_an_interrupt_of_who_does_a_shared_job_goes_on_up():
    def interrupted() -> None:
        raise KeyboardInterrupt

    notified, seen = [], []
    shared = SharedJobs([interrupted, lambda: seen.append(1)], lambda: notified.append(1))
    with pytest.raises(KeyboardInterrupt):
        shared.wait(10)
    assert not shared.is_done()
    assert shared.wait(10) and seen == notified == [1] and isinstance(shared.error, KeyboardInterrupt)
