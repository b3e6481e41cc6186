"""Imports run one way, and importing is light. The table is that of ARCHITECTURE.md."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "tiers": set(),
    "pager": {"tiers"},
    "engine": {"pager", "tiers", "kernels"},
    "tools": {"pager", "tiers", "engine", "kernels"},
}
BRIDGES = {"formats.py", "packing.py"}  # of tiers/: what a format's sizes are, and its arithmetic, are the kernels'
FORBIDDEN = {"pickle", "dill", "marshal"}
HARDWARE = {"cupy"}
CUDA_FILES = {"cuda.py"}
CUPY_FILES = {"cuda.py", "cuda_ipc.py"}  # the second without torch.cuda: a daemon loads it


def imports(path: Path, folder: str) -> set[str]:
    """Our folders and the third parties that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(ROOT / folder).parts) - 1
            if node.level == 0:
                found.add(node.module or "")
            elif node.level == depth + 2:
                found.add("kvtier." + (node.module or ""))
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        names = imports(path, folder)
        ours = {name.split(".")[1] for name in names if name.startswith("kvtier.")}
        bridge = {"kernels"} if folder == "tiers" and path.name in BRIDGES else set()
        assert ours - {folder} <= MAY_IMPORT[folder] | bridge, f"{path}: {ours}"
        assert not {name.split(".")[0] for name in names} & FORBIDDEN, path
        if path.name not in CUDA_FILES:
            assert "torch.cuda" not in path.read_text(), path
        if path.name not in CUPY_FILES:
            assert not {name.split(".")[0] for name in names} & HARDWARE, path


def test_the_inspector_knows_only_how_to_ask():
    for path in (ROOT / "tools" / "inspect").glob("*.py"):
        ours = {name for name in imports(path, "tools") if name.startswith("kvtier") and "tools" not in name}
        assert ours <= {"kvtier.pager.inspection.asking"}, path


@pytest.mark.parametrize(
    "module",
    [
        "kvtier",
        "kvtier.tools.inspect",
        "kvtier.tools.pagerd",
        "kvtier.pager.pager",
        "kvtier.engine.server",
        "kvtier.tools.serve",
    ],
)
def test_importing_is_light(module):
    code = f"import sys, {module}; print({{'torch', 'cupy', 'zarr', 'fastapi', 'uvicorn'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "set()"


def test_a_daemon_that_serves_has_loaded_nothing_that_only_a_model_needs():
    """What it imports until it is ready: no more than its start may take."""
    code = (
        "import sys, kvtier.tools.pagerd, kvtier.pager.daemon.server, kvtier.pager.daemon.settings\n"
        "import kvtier.pager.daemon.manners, kvtier.pager.daemon.table, kvtier.pager.daemon.logs\n"
        "names = {'torch', 'cupy', 'kvtier.tiers.cuda_ipc', 'zarr', 'crc32c', 'email'}\n"
        "print((names | {'kvtier.tiers.nvme.store', 'kvtier.pager.daemon.store'}) & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "set()"


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for f in MAY_IMPORT for p in (ROOT / f).rglob("__init__.py")}
    assert listed == {"kvtier"} | {"kvtier." + ".".join(folder.parts) for folder in folders}


def test_public_names_load():
    import kvtier

    assert {getattr(kvtier, name) is not None for name in kvtier.__all__} == {True}
    with pytest.raises(AttributeError, match="public names"):
        kvtier.nothing  # noqa: B018
