"""The wheel, the editable install, pytest and spawned processes all see the same names."""

from __future__ import annotations

import inspect
import multiprocessing
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .test_layers import MAY_IMPORT, ROOT

COMMANDS = ("kvtier", "pagerd", "pager-inspect")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because building writes into the tree that it builds."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*MAY_IMPORT, "kvtier"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = out.glob("kvtier-*.whl")
    return file


def test_the_wheel_holds_every_module_once(wheel):
    held = [name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")]
    wanted = {f"kvtier/{path.relative_to(ROOT)}" for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")}
    assert sorted(held) == sorted(
        wanted | {"kvtier/__init__.py", "kvtier/py.typed", "kvtier/tools/inspect/report.html"}
    )


def test_an_installed_wheel_runs_its_commands_and_spawns(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "from kvtier import KVLayout\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        layout = pool.apply(KVLayout, (1, 1, 8))\n"
        "    print(layout == KVLayout(1, 1, 8), __import__('kvtier').__file__)\n"
    )
    run = dict(capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""})
    out = subprocess.run([sys.executable, script], check=True, **run).stdout.split()
    assert out == ["True", str(tmp_path / "site" / "kvtier" / "__init__.py")]
    for command in COMMANDS:
        result = subprocess.run([sys.executable, tmp_path / "site" / "bin" / command, "--help"], check=True, **run)
        assert command in result.stdout


def test_a_spawned_process_imports_what_pytest_imports():
    from kvtier import KVLayout

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(inspect.getfile, (KVLayout,)).get(60) == inspect.getfile(KVLayout)
    assert KVLayout.__module__ == "kvtier.tiers.layout"


def test_the_commands_are_installed():
    for command in COMMANDS:
        assert (Path(sys.executable).parent / command).exists(), f"{command}: run make setup"
