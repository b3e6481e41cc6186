"""How the host tier's memory is set: arguments, environment and TOML alike, refusals by name, and what status tells."""

from __future__ import annotations

import time

import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.config import load_config
from kvtier.pager.protocol import encode
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError
from kvtier.tools import inspect

LAYOUT = KVLayout(4, 2, 64, 64, "float32")


def test_environment_and_file_say_the_same_as_arguments(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('device_bytes = "1MiB"\nhost_numa = 1\nhost_prefault = true\nhost_huge_pages = "reserved"\n')
    assert load_config(file, env={}).host_numa == 1 and load_config(file, env={}).host_huge_pages == "reserved"
    env = {"KVTIER_HOST_NUMA": "interleave", "KVTIER_HOST__PREFAULT": "false", "KVTIER_HOST_HUGE_PAGES": "off"}
    config = load_config(file, env=env)
    assert (config.host_numa, config.host_prefault, config.host_huge_pages) == ("interleave", False, "off")
    assert load_config(file, env=env, host_huge_pages="auto").host_huge_pages == "auto"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"host_numa": "near"},
            "host_numa='near' is unknown; choose auto, off, interleave, split or the number of a node",
        ),
        ({"host_huge_pages": "1GiB"}, "host_huge_pages='1GiB' is unknown; choose auto"),
        ({"host_prefault": "no"}, "host_prefault='no': choose true or false"),
    ],
)
def test_a_refusal_names_setting_value_and_choices(setting, message):
    with pytest.raises(ConfigError, match=message):
        PagerConfig("1MiB", **setting).validate()


def test_a_node_that_is_not_there_is_refused_at_open(tmp_path):
    config = PagerConfig("4MiB", "4MiB", backend="cpu", host_numa=999, nvme_path=tmp_path / "s", nvme_bytes="8MiB")
    with pytest.raises(ConfigError, match="host_numa=999: nodes with memory for this process are"):
        Pager.open(LAYOUT, config)
    Pager.open(LAYOUT, PagerConfig("4MiB", "4MiB", nvme_path=tmp_path / "s", nvme_bytes="8MiB", backend="cpu")).close()


def test_the_host_tier_is_prefaulted_and_status_says_so(capsys, tmp_path):
    config = PagerConfig("8MiB", "16MiB", nvme_path=tmp_path / "s", nvme_bytes="32MiB", backend="cpu")
    with Pager.open(LAYOUT, config) as pager:
        deadline_s = time.monotonic() + 60
        while (memory := pager.status()["tiers"]["host"]["memory"])["prefault"] == "running":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert memory["prefault"] in ("done", "refused")  # refused: an old kernel, or no room; then it says why
        assert memory["prefault"] == "done" or memory["notices"]
        assert memory["prefault_total_bytes"] == pager.status()["tiers"]["host"]["capacity_bytes"]
        assert encode(1, 1, pager.status())
        assert inspect.main(["status", str(tmp_path / "s"), "--timeout", "60"]) == 0
        assert f"host memory: prefault {memory['prefault']}, " in capsys.readouterr().out


def test_prefaulting_can_be_switched_off_and_ends_with_the_pager():
    for wanted in (False, True):
        pager = Pager.open(LAYOUT, PagerConfig("8MiB", "512MiB", host_prefault=wanted), backend=CpuBackend())
        memory = pager._core.memory
        pager.close()
        state = memory.status()["prefault"]
        assert state in ("done", "stopped", "refused") if wanted else state == "off"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nvme_queue_depth": 0}, "nvme_queue_depth=0"),
        ({"nvme_queue_depth": "many"}, "nvme_queue_depth='many'"),
        ({"nvme_segment_bytes": "1KiB"}, "nvme_segment_bytes='1KiB'"),
    ],
)
def test_disk_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PagerConfig("1MiB", **settings).validate()


def test_the_queue_depth_is_that_of_the_backend():
    with Pager.open(
        KVLayout(1, 1, 8, 16, "float32"), PagerConfig("1MiB", "1MiB", backend="cpu", nvme_queue_depth=3)
    ) as pager:
        assert pager.backend.read_io.num_threads == pager.backend.write_io.num_threads == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device_bytes": "9" * 400}, "device_bytes='999.*more than there can be"),
        ({"window": True}, "window=True: give a whole number"),
        ({"low_watermark": b"0.1"}, "low_watermark=b'0.1': give a number"),
        ({"nvme_path": "/a\0b", "host_bytes": "1GiB"}, "a zero character in a path"),
        ({"namespace_secrets": {"a": 5}}, "namespace_secrets"),
        ({"namespace_secrets": {7: "00"}}, "namespace_secrets|namespace=7"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, env={}, **({"device_bytes": "1GiB"} | setting))


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "kvtier.toml"
    path.write_bytes(b'device_bytes = "\xff"')
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(path, env={})
