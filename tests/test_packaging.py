"""What an installation puts where: `besa` alone, with `besa.export` and `besa.serve` inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "besa/kernels/libbesa_kernels.so"
OPERATOR = "besa/kernels/libbesa_ort.so"  # where there is ONNX Runtime's header
COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output, away from the checkout and from this environment's import paths."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["SOURCE_DATE_EPOCH"] = "1700000000"  # as `make wheel` sets it, to the commit's time
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def build() -> list[str]:
    """pip's arguments: where `make` has compiled the kernels, only what has changed is compiled."""
    return [f"--config-settings=build-dir={Path(sys.prefix) / 'kernels'}"]


def pip(*arguments: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, build) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", *build, "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_besa_alone(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert {entry for entry in top if not entry.endswith(".dist-info")} == {"besa"}
    assert len(top) == 2

    def sources(folder: str, inside: str) -> set[str]:
        tracked = (p for p in (ROOT / folder).rglob("*") if p.is_file())
        suffixes = {".py", ".typed", ".j2", ".css", ".json", ".cu", ".cuh"}
        kept = (p for p in tracked if p.suffix in suffixes)
        return {f"{inside}/{p.relative_to(ROOT / folder).as_posix()}" for p in kept}

    assert names >= sources("besa", "besa")
    assert names >= sources("export", "besa/export")
    assert names >= sources("serve", "besa/serve")
    assert "besa/demo/model/model.safetensors" in names
    assert "besa/kernels/cuda/device.cuh" in names  # compiled on the user's machine
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc"))]
    assert (LIBRARY in names) == COMPILER


def test_the_same_sources_give_the_same_bytes(wheel, build, tmp_path):
    pip("wheel", *build, "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    code = "from scikit_build_core.build import build_sdist as b; import sys; b(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=ROOT)
    (path,) = tmp_path.glob("besa-*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = [ROOT / name for name in ("besa", "export", "serve")]
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".json"}
    needed = [p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes]
    assert names >= {p.relative_to(ROOT).as_posix() for p in needed}
    assert names >= {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert not [name for name in names if name.startswith((".ci", ".git/", ".venv", "build/"))]


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_install_adds_besa_alone(wheel, build, tmp_path, editable):
    # A fresh environment that sees this one's torch and build tools, but none of its .pth files,
    # so not the besa that is being tested.
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    what = [*build, "--editable", ROOT] if editable else [wheel]
    # By this pip: with another Python the build would begin anew.
    into = ["--prefix", tmp_path / "venv", "--ignore-installed"]
    pip("install", "--no-index", *into, *what, cwd=tmp_path)

    top = {p.name for p in site.iterdir() if p.suffix != ".dist-info"} - {"outer.pth"}
    redirect = {"_editable_skbc_besa.pth", "_editable_skbc_besa.py"} if editable else set()
    assert top - {"__pycache__"} <= {"besa"} | redirect
    if editable:  # all but the library is read from the checkout
        copied = {p.relative_to(site).as_posix() for p in (site / "besa").rglob("*") if p.is_file()}
        assert copied <= {LIBRARY, OPERATOR}

    script = f"""
from importlib.util import find_spec
import besa, besa.export, besa.serve
from besa.kernels import native
for module in (besa, besa.export, besa.serve, native):
    assert module.__file__.startswith({str(ROOT if editable else site)!r}), module.__file__
for name in ("export", "serve", "benchmarks", "tests"):
    assert find_spec(name) is None, name
from besa.kernels.cuda import driver
assert "device.cuh" in driver.headers()
library = native.library()
assert (library is not None) == {COMPILER}
assert library is None or library._name.startswith({str(site)!r}), library._name
"""
    run(python, "-c", script, cwd=tmp_path)
