"""Doctor names the planted cause, in a real pager in another process; and says nothing where nothing is wrong."""

from __future__ import annotations

import pytest

from .inspecting import BLOCK_BYTES, asked, broken_rules, inspect, running


def found(pager) -> dict[str, str]:
    """Findings by name, with what was seen."""
    return {finding["name"]: finding["what"] for finding in asked(pager, "doctor")["findings"]}


def serious(pager) -> set[str]:
    """Names of all that is not merely information; what other tests do to this disk is not meant."""
    names = {f["name"] for f in asked(pager, "doctor")["findings"] if f["severity"] != "info"}
    return names - {"two stores on one disk", "slow disk"}


def test_a_pager_that_is_well_has_no_finding(tmp_path):
    with running(tmp_path, store=False) as pager:
        for _ in range(3):
            pager.do("[pager.finish(compute([n] * 160)) for n in range(4)]")
        assert serious(pager) == set()
        done = inspect("-s", pager.where, "doctor")
        assert done.returncode == 0 and "nothing is wrong" in done.stdout
        assert inspect("-s", pager.where, "status", "--exit-code").returncode == 0


def test_a_tiny_host_tier_is_named(tmp_path):
    with running(tmp_path, store=False, host_bytes=4 * BLOCK_BYTES) as pager:
        for _ in range(4):
            pager.do("[pager.finish(compute([n] * 400)) for n in range(5)]")
        pager.do("assert pager.drain()")
        assert serious(pager) == {"host tier too small"}
        done = inspect("-s", pager.where, "doctor")
        assert done.returncode == 1 and "raise host_bytes" in done.stdout
        status = inspect("-s", pager.where, "status", "--exit-code")
        assert status.returncode == 1 and "WARN" in status.stdout and "host tier too small" in status.stdout


def test_a_tiny_host_tier_over_nvme_is_named_by_what_is_read_again(tmp_path):
    with running(tmp_path, host_bytes=12 * BLOCK_BYTES, device_bytes=40 * BLOCK_BYTES) as pager:
        for _ in range(4):
            pager.do("[pager.finish(compute([n] * 400)) for n in range(5)]")
        assert "host tier too small" in serious(pager)
        assert "had been read before" in found(pager)["host tier too small"]


def test_a_write_budget_that_keeps_blocks_off_the_disk_is_named_and_not_the_disk(tmp_path):
    with running(
        tmp_path, host_bytes=12 * BLOCK_BYTES, device_bytes=40 * BLOCK_BYTES, nvme_write_bytes_per_s=1
    ) as pager:
        for _ in range(4):
            pager.do("[pager.finish(compute([n] * 400)) for n in range(5)]")
        pager.do("assert pager.drain()")
        told = found(pager)
        assert "write budget of nvme too small" in serious(pager) and "nvme tier too small" not in told
        assert " slots are in use" in told["write budget of nvme too small"]


def test_a_starved_write_back_is_named(tmp_path):
    """Every host slot is pinned by clients, so no dirty page can be written down."""
    with running(tmp_path, store=False, host_bytes=8 * BLOCK_BYTES, device_bytes=24 * BLOCK_BYTES) as pager:
        pager.do("a = compute([1] * 160); pager.pin(a, 600.0); pager.demote(a); pager.drain(5.0)")
        pager.do("b = compute([2] * (16 * core.groups[0].pages.num_free))")
        pager.do("import time; time.sleep(1.1); pager.poll()")
        assert "write-back starved" in serious(pager)
        assert "8 pinned" in found(pager)["write-back starved"]


def test_a_session_that_hogs_is_named(tmp_path):
    with running(tmp_path, device_bytes=40 * BLOCK_BYTES, staging_bytes=0) as pager:
        pager.do("pager.checkpoint('hog', hog := compute(list(range(16 * 30))))")
        pager.do("others = [compute([n] * 64) for n in range(1, 3)]")
        pager.do("[pager.finish(compute([n] * 64)) for n in range(3, 7)]")
        pager.do("n = pager.num_tokens(hog); pager.append(hog, [5]); pager.lease([Span(hog, n, n + 1)]).release()")
        assert "one session hogs the device tier" in serious(pager)
        assert found(pager)["one session hogs the device tier"].startswith("hog (namespace default) holds")


def test_a_quota_that_is_hit_is_named(tmp_path):
    with running(tmp_path, namespace_quotas={"mine": 10 * BLOCK_BYTES * 4}) as pager:
        pager.do("pager.park('one', compute(list(range(96)), 'mine'))")
        pager.do("s = compute(list(range(1000, 1640)), 'mine')")
        pager.do(
            "try: pager.park('two', s, timeout_s=10.0)\nexcept KvTierError as error: result = str(error)",
        )
        assert "quota hit" in serious(pager)
        assert "namespace 'mine' holds" in found(pager)["quota hit"]
        assert "refused by nvme, quota" in inspect("-s", pager.where, "trace", "--limit", 500).stdout


def test_a_slow_disk_is_named(tmp_path):
    with running(tmp_path) as pager:
        pager.do(
            "import time\n"
            "from kvtier.tiers.nvme.calls import SystemCalls\n"
            "real = SystemCalls.pwritev\n"
            "def slow(self, fd, buffers, offset):\n"
            "    time.sleep(0.05)\n"
            "    return real(self, fd, buffers, offset)\n"
            "SystemCalls.pwritev = slow"
        )
        pager.do("[pager.park(f's{n}', compute([n] * 160), timeout_s=30.0) for n in range(6)]")
        assert "writes to" in found(pager)["slow disk"]


def test_unpinned_memory_is_named_and_no_trouble_without_a_gpu(tmp_path):
    with running(tmp_path) as pager:
        findings = {f["name"]: f for f in asked(pager, "doctor")["findings"]}
        assert findings["unpinned memory"]["severity"] == "info"
        pager.do("type(core.backend).name = 'cuda'")  # no GPU here: the rule alone, over the real counters
        findings = {f["name"]: f for f in asked(pager, "doctor")["findings"]}
        assert findings["unpinned memory"]["severity"] == "warn" and "memlock" in findings["unpinned memory"]["mend"]


@pytest.mark.parametrize("depth", [0, 3])
def test_a_changed_template_is_named_with_the_block_where_it_changed(tmp_path, depth):
    with running(tmp_path, device_bytes="512KiB") as pager:
        pager.do("old, user = list(range(100, 196)), lambda n: [5000 + n] * 40")
        pager.do("[pager.finish(compute(old + user(n))) for n in range(12)]")
        assert serious(pager) == set()
        pager.do(f"new = list(old); new[{depth} * 16 + 2] = 7")
        pager.do("[pager.finish(compute(new + user(n))) for n in range(20, 28)]")
        name = "key mismatch after a changed template"
        assert serious(pager) == {name}
        assert f"another block {depth} (tokens from {depth * 16})" in found(pager)[name]


def test_prompts_that_were_never_alike_are_no_changed_template(tmp_path):
    with running(tmp_path, device_bytes="512KiB") as pager:
        pager.do("[pager.finish(compute([n] * 64)) for n in range(40)]")
        assert "key mismatch after a changed template" not in found(pager)


def test_two_stores_on_one_disk_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with running(tmp_path / "a") as pager:
        assert str(tmp_path) not in _all_neighbours(pager)
        with running(tmp_path / "b") as other:
            assert str(other.where) in _all_neighbours(pager)
            assert "more open store(s)" in found(pager)["two stores on one disk"]
        assert str(tmp_path / "b") not in _all_neighbours(pager)


def _all_neighbours(pager) -> str:
    return str(
        pager.do(
            "from pathlib import Path\nfrom kvtier.pager.inspection.neighbours import other_stores\n"
            "result = [path for _, path in other_stores(Path(core.config.nvme_path))]"
        )
    )


def test_a_disk_that_refuses_writes_is_named(tmp_path):
    with running(tmp_path) as pager:
        pager.do(
            "import errno\n"
            "from kvtier.tiers.nvme.calls import SystemCalls\n"
            "def refuse(self, fd, buffers, offset):\n"
            "    raise OSError(errno.ENOSPC, 'no space left')\n"
            "SystemCalls.pwritev = refuse"
        )
        for number in range(3):
            pager.do(
                f"s = compute([{number}] * 16)\n"
                f"try: pager.park('s{number}', s, timeout_s=10.0)\nexcept KvTierError as error: result = str(error)"
            )
        assert "nvme takes no writes" in serious(pager)
        checks = {row["rule"]: row["verdict"] for row in asked(pager, "check")["checks"]}
        assert checks["N1"] == "crit"
        assert inspect("-s", pager.where, "check").returncode == 1


def test_check_names_a_book_that_does_not_agree(tmp_path):
    with running(tmp_path) as pager:
        pager.do("pager.park('alice', compute([1] * 160))")
        assert broken_rules(asked(pager, "check")) == []
        for plant, mend, rule in (
            ("core.groups[0].directory.refs[0] += 1", "core.groups[0].directory.refs[0] -= 1", "B3"),
            ("core.groups[0].pages.pins[-1] += 1", "core.groups[0].pages.pins[-1] -= 1", "R5"),
        ):
            pager.do(plant)
            broken = broken_rules(asked(pager, "check"))
            pager.do(mend)
            assert broken == [rule]
        assert broken_rules(asked(pager, "check")) == []
