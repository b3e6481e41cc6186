"""pagerd's configuration: where a setting may come from, what is refused and how, what is printed; secrets and tokens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.pager.config import DAEMON_SETTINGS, PagerConfig, load_config
from kvtier.pager.daemon import secret_files
from kvtier.pager.daemon.settings import (
    DaemonConfig,
    default_config_file,
    default_socket,
    load_daemon_config,
    print_config,
)
from kvtier.pager.daemon.sockets import listen
from kvtier.pager.daemon.table import TenantTable, tenants_of
from kvtier.pager.settings import to_toml
from kvtier.tiers.errors import ConfigError

TOKEN, OTHER_TOKEN = ((t, secret_files.hash_token(t)) for t in ("kvt_" + "t" * 43, "kvt_" + "u" * 43))


def write(tmp_path, text: str) -> Path:
    file = tmp_path / "pagerd.toml"
    file.write_text(text)
    return file


@pytest.fixture
def root(tmp_path) -> Path:
    secret_files.write_new_secret(tmp_path / "root.secret")
    return tmp_path / "root.secret"


@pytest.fixture
def full(tmp_path, root) -> Path:
    secret_files.write_new_secret(tmp_path / "alice.secret")
    return write(
        tmp_path,
        f"""
host_bytes = "2GiB"
nvme_path = "{tmp_path / "s"}"
nvme_bytes = "8GiB"
max_models = 2
root_secret_file = "{root}"
slab_uids = [4242]
[limits]
connections = 7
drain_s = 3
[namespaces.alice]
uids = [1001]
gids = [2001]
tokens = ["{TOKEN[1]}"]
secret_file = "{tmp_path / "alice.secret"}"
host_floor = "256MiB"
nvme_ceiling = "4GiB"
write_bytes_per_s = "100MiB"
pins = 100
[namespaces.bob]
uids = [1002]
tokens = ["{OTHER_TOKEN[1]}"]
""",
    )


# ---------------------------------------------------------------------- where a setting comes from
def test_flag_over_environment_over_file_over_default(full):
    env = {"KVTIER_HOST__BYTES": "3GiB", "KVTIER_LIMITS__DRAIN_S": "5", "KVTIER_POLICY": "lru", "KVTIER_DEBUG": "1"}
    config = load_daemon_config(full, env=env, nvme_bytes="9GiB", socket=None)
    assert (config.host_size, config.nvme_size) == (3 << 30, 9 << 30)
    assert (config.limits.connections, config.limits.drain_s, config.limits.requests_in_flight) == (7, 5.0, 64)
    assert config.durability == "batch"


def test_quotas_of_namespaces_are_those_of_each_models_pager(full):
    config = load_daemon_config(full, env={})
    assert config.quota("alice").nvme_ceiling == 4 << 30 and "bob" not in config.namespace_quotas
    shares = config.pager_settings()["namespace_quotas"]
    assert shares == {
        "alice": {"host_floor": 128 << 20, "nvme_ceiling": 2 << 30, "write_bytes_per_s": 50 << 20, "pins": 100}
    }
    PagerConfig(
        device_bytes=1, host_bytes="1GiB", nvme_path="s", nvme_bytes="4GiB", **config.pager_settings()
    ).validate()


def test_one_file_serves_pagerd_and_the_engines(tmp_path):
    file = write(
        tmp_path, 'device_bytes = "1GiB"\nhost_bytes = "2GiB"\nsocket = "/run/x.sock"\n[limits]\nconnections = 3\n'
    )
    assert load_config(file, env={}).device_size == 1 << 30
    assert load_daemon_config(file, env={}).limits.connections == 3
    assert set(DAEMON_SETTINGS) == {f.name for f in fields(DaemonConfig)} - {f.name for f in fields(PagerConfig)}


def test_default_places_follow_xdg_and_systemd(tmp_path):
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/kvtier/pagerd.sock")
    assert default_socket({}) == Path("/run/kvtier/pagerd.sock")
    both = {"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_socket(both) == Path("/run/a/pagerd.sock")
    assert default_config_file({"XDG_CONFIG_HOME": str(tmp_path)}) in (None, Path("/etc/kvtier/pagerd.toml"))
    (tmp_path / "kvtier").mkdir()
    (tmp_path / "kvtier" / "pagerd.toml").write_text("")
    assert default_config_file({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "kvtier" / "pagerd.toml"


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('host_byte = "1GiB"', r"pagerd.toml: 'host_byte' is an unknown setting; did you mean 'host_bytes'\?"),
        ("[limits]\nconnection = 1", r"limits.connection is an unknown setting; did you mean 'connections'\?"),
        ("[namespaces.a]\nuid = [1]", r"namespaces.a.uid is an unknown setting; did you mean 'uids'\?"),
        ("[limits]\nconnections = 0", "limits.connections=0: need at least 1"),
        ('[limits]\nconnections = "many"', "limits.connections='many': give a whole number"),
        ("[limits]\nconnections = true", "limits.connections=True: give a whole number"),
        ('[limits]\nbytes_in_flight = "1KiB"', "limits.bytes_in_flight='1KiB': one frame may have 1 MiB"),
        ("limits = 7", "limits=7: give a table of settings"),
        ('log_format = "xml"', "log_format='xml' is unknown; choose text, json"),
        ("max_models = 0", "max_models=0: need 1 to 64"),
        ("socket_mode = 0o777", "socket_mode=0o777: choose 0o600, 0o660, 0o666"),
        ("host_bytes = 0", "host_bytes=0: the daemon's blocks live there"),
        ('low_watermark = "low"', "low_watermark='low': give a number"),
        (
            "[namespaces.a]\nuids = [1]",
            "namespaces.a has no secret: give namespaces.a.secret_file, or root_secret_file",
        ),
        ('[namespaces."a b"]', "namespace='a b': use 1 to 64 letters"),
        ('[namespaces.a]\nuids = ["x"]', "namespaces.a.uids='x': give a whole number"),
        ("[namespaces.a]\nuids = [-1]", "uid or gid -1 must not be negative"),
        ('[namespaces.a]\ntokens = ["hunter2"]', "namespaces.a.tokens: a token's hash is blake2b:"),
        (f'[namespaces.a]\ntokens = ["{TOKEN[0]}"]', "namespaces.a.tokens holds a token; keep its hash there"),
        ('nvme_codec = "aes"\nnvme_path = "s"', "encrypts with the secrets of .namespaces.; there is none"),
        ('listen = "0.0.0.0:7070"', "TCP is served with TLS only; give tls_cert and tls_key"),
        ('listen = "[::]:1"\ntls_cert = "c"\ntls_key = "k"', "TCP clients show a token, and no namespace has tokens"),
        ('[namespace_secrets]\na = "00"', "namespace_secrets: a daemon takes secrets and quotas of its .namespaces."),
        ("host_bytes = ", "pagerd.toml is not valid TOML"),
    ],
)
def test_a_refusal_names_the_setting_and_what_would_do(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        load_daemon_config(write(tmp_path, text), env={})
    assert "hunter2" not in str(refusal.value) and TOKEN[0] not in str(refusal.value)


def test_a_slip_in_the_environment_is_refused_and_what_is_others_is_left_alone(tmp_path):
    file = write(tmp_path, "")
    for variable in ("KVTIER_HOST_BYTE", "KVTIER_LIMITS__CONECTIONS"):
        with pytest.raises(ConfigError, match=rf"environment {variable} is an unknown setting; did you mean KVTIER_"):
            load_daemon_config(file, env={variable: "1"})
    load_daemon_config(file, env={"KVTIER_DEBUG": "1", "KVTIER_DEPLOYED_BY": "ops", "HOST_BYTE": "1"})
    with pytest.raises(ConfigError, match="environment KVTIER_MAX_MODELS='two' is not a int"):
        load_daemon_config(file, env={"KVTIER_MAX_MODELS": "two"})


@given(st.binary(max_size=300))
def test_any_bytes_in_a_file_are_read_or_refused_in_words(tmp_path_factory, raw):
    file = tmp_path_factory.mktemp("c") / "c.toml"
    file.write_bytes(raw)
    try:
        load_daemon_config(file, env={})
    except ConfigError:
        pass


# ---------------------------------------------------------------------- what is printed
def test_what_is_printed_reads_back_the_same_and_tells_no_secret(full, tmp_path):
    config = load_daemon_config(full, env={})
    printed = print_config(config)
    for secret in config.namespace_secrets.values():
        assert secret not in printed
    assert TOKEN[1] not in printed and "***" in printed
    again = tomllib.loads(printed)
    assert again["namespaces"]["alice"]["uids"] == [1001] and again["limits"]["connections"] == 7
    for table in again["namespaces"].values():
        table["tokens"] = []
    reread = load_daemon_config(write(tmp_path, to_toml(again)), env={})
    assert (reread.limits, reread.host_size, reread.slab_uids) == (config.limits, config.host_size, (4242,))
    assert reread.namespace_secrets == config.namespace_secrets


_TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
_VALUE = st.one_of(
    st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), _TEXT, st.lists(_TEXT, max_size=3)
)


@given(st.dictionaries(_TEXT, st.one_of(_VALUE, st.dictionaries(_TEXT, _VALUE, min_size=1, max_size=3)), max_size=5))
def test_toml_that_is_written_is_read_back(values):
    assert tomllib.loads(to_toml(values)) == values


# ---------------------------------------------------------------------- secrets and tokens
def test_a_secret_that_others_can_read_is_refused(tmp_path, root):
    secret_files.read_secret(root, name="x")
    for mode in (0o640, 0o604, 0o660):
        root.chmod(mode)
        with pytest.raises(ConfigError, match=rf"x='.*' can be read by others \(mode 0{mode:o}\): chmod 600 it"):
            secret_files.read_secret(root, name="x")
    root.chmod(0o600)
    (tmp_path / "link").symlink_to(root)
    for path, said in (
        (tmp_path / "link", "cannot be read"),
        (tmp_path / "none", "cannot be read"),
        ("no\0name", "cannot be read: embedded null byte"),
        (tmp_path, "is not a file"),
    ):
        with pytest.raises(ConfigError, match=said):
            secret_files.read_secret(path, name="x")


@pytest.mark.parametrize("text", ["", "zz" * 32, "00" * 15, "00" * 65, "secret words"])
def test_a_secret_of_another_kind_is_refused_and_not_shown(tmp_path, text):
    file = tmp_path / "secret"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="pagerd --new-secret") as refusal:
        secret_files.read_secret(file, name="x")
    assert not text or text not in str(refusal.value)


def test_a_new_secret_is_private_and_never_overwrites(root):
    assert root.stat().st_mode & 0o777 == 0o600 and len(secret_files.read_secret(root, name="x")) == 32
    with pytest.raises(ConfigError, match="cannot be made"):
        secret_files.write_new_secret(root)


def test_a_derived_secret_is_hkdf_and_differs_by_namespace():
    hkdf = pytest.importorskip("cryptography.hazmat.primitives.kdf.hkdf")
    from cryptography.hazmat.primitives.hashes import SHA256

    root = b"r" * 32
    expected = hkdf.HKDF(SHA256(), 32, b"kvtier namespace secret 1", b"alice").derive(root)
    assert secret_files.derive_secret(root, "alice") == expected != secret_files.derive_secret(root, "bob")


def test_tokens_are_random_and_only_their_hash_is_kept():
    token, kept = secret_files.new_token()
    assert secret_files.is_token(token) and secret_files.hash_token(token) == kept and token not in kept
    assert secret_files.matches(token, [OTHER_TOKEN[1], kept]) == [False, True]
    assert secret_files.matches("", [kept]) == secret_files.matches(kept, [kept]) == [False]


# ---------------------------------------------------------------------- who is who
def test_uid_gid_and_token_name_namespaces_and_nothing_else_does(full):
    config = load_daemon_config(full, env={})
    table = tenants_of(config)
    assert isinstance(table, TenantTable)

    def names(uid, token="", gids=()):
        found = table.find(uid, token, gids)
        return None if found is None else sorted(found.namespaces)

    assert names(1001) == names(1, gids=(2001, 5)) == names(1, TOKEN[0]) == names(-1, TOKEN[0]) == ["alice"]
    assert names(1002, TOKEN[0]) == ["alice", "bob"]
    assert names(1) is names(1, "kvt_" + "A" * 43) is names(-1) is names(1, TOKEN[1]) is names(-1, gids=(2001,)) is None
    tenant = table.find(1001, "")
    assert tenant.owns("alice--salt") and not tenant.owns("bob") and not tenant.owns_all
    assert tenant.namespaces["alice"] == config.secret("alice")


def test_the_slab_is_for_the_daemons_own_user_and_those_that_are_named(tmp_path, root):
    file = write(
        tmp_path,
        f'root_secret_file = "{root}"\nslab_uids = [4242]\n[namespaces.a]\n'
        f'uids = [4242, 4243, {os.geteuid()}]\ntokens = ["{TOKEN[1]}"]\n',
    )
    table = tenants_of(load_daemon_config(file, env={}))
    assert [table.find(uid, "").maps_slab for uid in (4242, 4243, os.geteuid())] == [True, False, True]
    assert not table.find(-1, TOKEN[0]).maps_slab


def test_without_namespaces_only_the_own_user_is_let_in(tmp_path):
    tenants = tenants_of(load_daemon_config(write(tmp_path, ""), env={}))
    assert tenants.find(os.getuid(), "").owns_all and tenants.find(os.getuid() + 1, "") is None


def test_reading_a_configuration_loads_neither_torch_nor_zarr_nor_cryptography(full):
    code = (
        "import sys; from kvtier.pager.daemon.table import tenants_of; from kvtier.pager.daemon.settings import "
        f"load_daemon_config; tenants_of(load_daemon_config({str(full)!r})); "
        "print({'torch', 'zarr', 'cryptography', 'prometheus_client', 'asyncio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "set()"


def test_a_socket_in_a_directory_that_is_not_there_is_refused_with_the_directory(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"no directory {str(tmp_path / 'run')!r}; make it first")):
        listen(tmp_path / "run" / "pagerd.sock")
