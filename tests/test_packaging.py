"""What an installation puts where: `besa` alone, with `besa.export` and `besa.serve` inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "besa/kernels/libbesa_kernels.so"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output, away from the checkout and from this environment's import paths."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
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


def pip(*arguments: str | Path, python: Path | str = sys.executable, cwd: Path) -> None:
    run(python, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_besa_alone(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert {entry for entry in top if not entry.endswith(".dist-info")} == {"besa"}
    assert len(top) == 2

    def sources(folder: str, inside: str) -> set[str]:
        tracked = (p for p in (ROOT / folder).rglob("*") if p.is_file())
        kept = (p for p in tracked if p.suffix in {".py", ".typed", ".j2", ".css", ".json"})
        return {f"{inside}/{p.relative_to(ROOT / folder).as_posix()}" for p in kept}

    assert names >= sources("besa", "besa")
    assert names >= sources("export", "besa/export")
    assert names >= sources("serve", "besa/serve")
    assert "besa/demo/model/model.safetensors" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc"))]
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    assert (LIBRARY in names) == compiler


def test_wheel_runs(wheel, tmp_path):
    pip("install", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    installed = {p.name for p in (tmp_path / "site").iterdir() if p.suffix != ".dist-info"}
    assert installed <= {"besa", "bin"}
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import besa, besa.export, besa.serve
from besa.kernels import native
for module in (besa, besa.export, besa.serve, native):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
native.library()
print(besa.__version__)
"""
    # -W error: a library that doesn't load would warn.
    strict = ["-W", "error::UserWarning"] if (tmp_path / "site" / LIBRARY).exists() else []
    version = run(sys.executable, *strict, "-c", script, cwd=tmp_path).strip()
    assert wheel.name.startswith(f"besa-{version}-py3-none-")


def test_editable_install_adds_besa_alone(tmp_path):
    """In a fresh environment that sees this one's packages, besa itself aside."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(*site.getsitepackages())", cwd=tmp_path).strip())
    before = set(site.iterdir())
    # This environment's pip, on that one. Its own build tools are seen through a .pth.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    pip("install", "--no-index", "--editable", ROOT, python=python, cwd=tmp_path)

    added = {p.name for p in set(site.iterdir()) - before} - {"outer.pth"}
    assert not added & {"export", "serve", "benchmarks", "tests"}
    assert all("besa" in name for name in added), added
    files = {p.relative_to(site).as_posix() for p in (site / "besa").rglob("*") if p.is_file()}
    assert files <= {LIBRARY}  # all else is read from the checkout

    script = f"""
import importlib.util as util, os, sys
import besa, besa.export, besa.serve, besa.kernels
for module in (besa, besa.export, besa.serve, besa.kernels):
    assert module.__file__.startswith({str(ROOT)!r}), module.__file__
assert any(os.path.exists(os.path.join(p, "libbesa_kernels.so")) for p in besa.kernels.__path__)
for name in ("export", "serve", "benchmarks", "tests"):
    found = util.find_spec(name)
    assert found is None, found
"""
    run(python, "-c", script, cwd=tmp_path)
