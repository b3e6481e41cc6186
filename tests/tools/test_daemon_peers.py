"""The peers of `kvtier bench daemon`: a key-value server where one is installed, and what is said where none is."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tools.bench import daemon_peers, key_value_peer
from kvtier.tools.bench.daemon_peers import Peers
from kvtier.tools.bench.key_value_peer import KeyValuePeer

needs_server = pytest.mark.skipif(KeyValuePeer.find() is None, reason=key_value_peer.NOT_INSTALLED)


@needs_server
def test_a_server_gives_back_what_was_put_and_knows_what_it_has(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (20, 100_000), np.uint8)
    rows[3, :4] = np.frombuffer(b"\r\n+O", np.uint8)  # bytes that look like the protocol's
    keys, target = [bytes([i, 13, 10]) * 9 for i in range(20)], np.zeros_like(rows)
    with KeyValuePeer(tmp_path / "kv", KeyValuePeer.find()) as peer:
        assert peer.name.split()[0] in ("Valkey", "Redis") and peer.name.split()[1][0].isdigit()
        peer.put(keys, [memoryview(row) for row in rows])
        peer.get(keys, [memoryview(row) for row in target])
        assert np.array_equal(rows, target)
        assert peer.lookup([*keys, b"absent", *keys[:3]] * 100) == ([True] * 20 + [False] + [True] * 3) * 100
        with pytest.raises(ConfigError, match="does not hold a block"):
            peer.get([b"absent"], [memoryview(target[0])])


@needs_server
def test_a_round_measures_every_case_and_rows_compare_with_ours(tmp_path):
    with Peers(tmp_path, blocks=3, keys=50, lmcache=None) as peers:
        peers.run_round()
        peers.run_round()
        rows = peers.rows({"put": 1.0, "get": 1.0, "lookup": 0.001})
    measured = [row for row in rows if row.reference_value is not None]
    assert len(measured) == 3 and all(row.ratio > 0 and row.rounds == 2 for row in measured)
    assert [row.unit for row in measured] == ["GB/s", "GB/s", "ms"]


def test_what_is_not_installed_is_said_in_rows_without_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon_peers.KeyValuePeer, "find", staticmethod(lambda: None))
    with Peers(tmp_path, blocks=3, keys=50, lmcache=None) as peers:
        peers.run_round()
        rows = peers.rows({"get": 2.0})
    assert {row.reference for row in rows} == {key_value_peer.NOT_INSTALLED, daemon_peers.NO_LMCACHE}
    assert all(row.reference_value is row.ratio is None and row.value > 0 for row in rows)


def test_a_program_that_is_no_server_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not start"):
        KeyValuePeer(tmp_path / "kv", "/bin/false")
