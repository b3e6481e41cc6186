"""What was measured on a disk is found by who opens a store there, and nothing that such a file says can do harm."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest

from kvtier.pager.config import PagerConfig
from kvtier.pager.pager import Pager
from kvtier.tiers.errors import ConfigError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme import calibrate as calibration
from kvtier.tiers.nvme.disk_settings import DISK_FILE, DiskSettings, keep, settings_for
from kvtier.tools.cli import main

LAYOUT = KVLayout(num_layers=2, num_kv_heads=8, head_dim=32, block_size=64, dtype="float32")  # 256 KiB a block


def test_the_nearest_directory_that_says_something_counts(tmp_path):
    below = tmp_path / "a" / "b"
    assert settings_for(below) == DiskSettings() == settings_for(None)
    keep(tmp_path, 5, 8 << 20, {})
    assert settings_for(below) == DiskSettings(5, 8 << 20, tmp_path / DISK_FILE)  # which need not exist
    below.mkdir(parents=True)
    kept = keep(tmp_path / "a", 7, 16 << 20, {"read": {4: 1e9}})
    assert settings_for(below) == DiskSettings(7, 16 << 20, kept) and settings_for(tmp_path).queue_depth == 5


def test_another_disk_above_says_nothing(tmp_path, monkeypatch):
    keep(tmp_path, 5, 8 << 20, {})
    below = tmp_path / "mount"
    below.mkdir()
    real = type(tmp_path).stat

    def stat(self, **options):
        found = real(self, **options)
        return os.stat_result([*found[:2], found.st_dev + (self == below), *found[3:]]) if not options else found

    monkeypatch.setattr(type(tmp_path), "stat", stat)
    assert settings_for(below) == DiskSettings()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"version": 1, "queue_depth": 0, "segment_bytes": 8388608}',
        '{"version": 1, "queue_depth": 8, "segment_bytes": 1e30}',
        '{"version": 1, "queue_depth": true, "segment_bytes": 8388608}',
        '{"version": 1, "queue_depth": 100000, "segment_bytes": 8388608}',
        '{"version": 2, "queue_depth": 8, "segment_bytes": 8388608}',
        "[" * 60_000,
        "\0" * (1 << 17),
    ],
)
def test_a_file_that_says_what_cannot_be_is_left_aside(tmp_path, text, caplog):
    (tmp_path / DISK_FILE).write_text(text)
    with caplog.at_level(logging.WARNING, "kvtier.nvme"):
        assert settings_for(tmp_path) == DiskSettings()
    assert "disk_settings_bad" in caplog.text and "doctor --tune" in caplog.text


def test_neither_a_link_nor_a_pipe_is_read(tmp_path, caplog):
    keep(tmp_path, 5, 8 << 20, {}).rename(tmp_path / "other.json")
    (tmp_path / DISK_FILE).symlink_to(tmp_path / "other.json")
    assert settings_for(tmp_path) == DiskSettings() and "disk_settings_unread" in caplog.text
    (tmp_path / DISK_FILE).unlink()
    os.mkfifo(tmp_path / DISK_FILE)
    assert settings_for(tmp_path) == DiskSettings()  # and nothing waits for a writer


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_left_aside(tmp_path, caplog):
    os.chown(keep(tmp_path, 5, 8 << 20, {}), 12345, -1)
    assert settings_for(tmp_path) == DiskSettings() and "uid 12345" in caplog.text


def test_a_pager_goes_by_it_unless_it_is_told(tmp_path):
    keep(tmp_path, 3, 2 << 20, {})
    sizes = {"device_bytes": 4 << 20, "host_bytes": 4 << 20, "nvme_bytes": "64MiB", "backend": "cpu"}
    told = {"nvme_queue_depth": 5, "nvme_segment_bytes": "1MiB"}
    for name, more, depth, segment in (("a", {}, 3, 2 << 20), ("b", told, 5, 1 << 20)):
        with Pager.open(LAYOUT, PagerConfig(nvme_path=tmp_path / name, **sizes, **more)) as pager:
            assert pager.backend.write_io.num_threads == pager.backend.read_io.num_threads == depth
            geometry = pager._core.nvme.geometry(0)
            assert segment - geometry.stride < geometry.segment_bytes - geometry.header_bytes <= segment


def test_a_store_may_be_made_where_the_file_lies(tmp_path):
    keep(tmp_path, 3, 2 << 20, {})
    config = PagerConfig(
        device_bytes=4 << 20, host_bytes=4 << 20, nvme_path=tmp_path, nvme_bytes="64MiB", backend="cpu"
    )
    Pager.open(LAYOUT, config).close()


def test_a_daemon_goes_by_it_too(tmp_path):
    from kvtier.pager.daemon.store import SharedStore

    keep(tmp_path, 3, 2 << 20, {})
    config = PagerConfig(device_bytes=0, host_bytes=8 << 20, nvme_path=tmp_path / "s", nvme_bytes="64MiB")
    store = SharedStore.open((LAYOUT,), config, model_fingerprint="m", about={})
    assert store.core.backend.read_io.num_threads == 3
    store.close()


@pytest.mark.parametrize(
    "setting", [{"nvme_queue_depth": "Auto"}, {"nvme_queue_depth": True}, {"nvme_segment_bytes": "4TiB"}]
)
def test_bad_settings_are_refused_and_auto_is_named(setting):
    with pytest.raises(ConfigError, match="or 'auto'"):
        PagerConfig(device_bytes="1MiB", **setting).validate()


def test_the_smallest_that_is_nearly_best_is_chosen():
    found = calibration.Calibration({4: 1.0, 8: 1.9, 12: 2.0}, {4: 1.96, 8: 2.0, 12: 1.0}, {1: 1.0, 2: 0.96, 4: 1.1})
    assert found.queue_depth == 8 and found.segment_bytes == 4


def test_doctor_measures_keeps_and_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "NUM_BLOCKS", 4)
    monkeypatch.setattr(calibration, "DEPTHS", (2, 3, 4))
    monkeypatch.setattr(calibration, "SEGMENTS", (8 << 20, 16 << 20))
    found = calibration.calibrate(tmp_path, rounds=1)
    assert found.queue_depth in (2, 3, 4) and found.segment_bytes in (8 << 20, 16 << 20)
    assert all(np.isfinite(rate) and rate > 0 for rate in (*found.write_rates.values(), *found.segment_rates.values()))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("kvtier.tools.doctor._tune", lambda: None)  # of the kernels, tested elsewhere
    assert main(["doctor", "--tune", "--path", str(tmp_path)]) == 0
    said = json.loads((tmp_path / DISK_FILE).read_text())
    assert settings_for(tmp_path).queue_depth == said["queue_depth"] in (2, 3, 4)
    assert f"queue depth {said['queue_depth']}" in (shown := capsys.readouterr().out) and "fill: 8.0 MiB" in shown
    assert [file.name for file in tmp_path.iterdir()] == [DISK_FILE]


def test_doctor_says_where_it_cannot_keep_what_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kvtier.tools.doctor._tune", lambda: None)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvtier.tools.doctor.calibrate", refuse)
    assert main(["doctor", "--tune", "--path", str(tmp_path)]) == 2
    assert f"{tmp_path / DISK_FILE} cannot be made: Permission denied" in capsys.readouterr().err
