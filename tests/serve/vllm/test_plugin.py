"""vLLM's entry point in a vLLM that besa does not know: a line that says so, no stack trace.

The vLLMs here are empty packages with a version. The real one is in test_engine.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from besa.serve.vllm.engine import VERSIONS, fits
from tests.helpers import REPOSITORY

CALL = "from importlib.metadata import entry_points as e; {}; print('goes on')"
REGISTER = "[p.load()() for p in e(group='vllm.general_plugins') if p.name == 'besa']"


def register(
    directory: Path, version: str, program: str = CALL.format(REGISTER)
) -> subprocess.CompletedProcess[str]:
    """What vLLM does when it starts, with a vLLM that has nothing of what besa needs."""
    (directory / "vllm").mkdir()
    (directory / "vllm" / "__init__.py").write_text(f"__version__ = '{version}'\n")
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
    )


# Linux's arch_prctl: what the process may use of the CPU, a bit each.
PERMISSIONS = """
import ctypes; found = ctypes.c_ulong()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(found)) == 0
print("AMX" if found.value >> 18 & 1 else "no AMX")
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a CPU without AMX")
def test_processes_may_use_amx(tmp_path: Path):
    """Whatever the model: vLLM's attention uses it unasked."""
    program = "\n".join([PERMISSIONS, CALL.format(REGISTER), PERMISSIONS])
    finished = register(tmp_path, f"{VERSIONS[0]}.1", program)
    assert finished.stdout.splitlines() == ["no AMX", "goes on", "AMX"], finished.stderr


@pytest.mark.parametrize("version", ["0.11.2", "0.99.0", "dev"])
def test_a_version_that_besa_does_not_know(tmp_path: Path, version: str):
    finished = register(tmp_path, version)
    assert finished.stdout == "goes on\n"
    assert finished.returncode == 0
    assert "Traceback" not in finished.stderr
    assert f"besa knows vLLM from {VERSIONS[0]} and below {VERSIONS[1]}" in finished.stderr
    assert f"this is {version}" in finished.stderr
    assert f"packed models cannot be loaded into vLLM {version}" in finished.stderr
    assert f"install vllm>={VERSIONS[0]},<{VERSIONS[1]}" in finished.stderr


def test_a_known_version_that_is_broken(tmp_path: Path):
    finished = register(tmp_path, f"{VERSIONS[0]}.1")
    assert finished.stdout == "goes on\n"
    assert "besa knows vLLM" not in finished.stderr
    assert "packed models cannot be loaded into vLLM" in finished.stderr


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (VERSIONS[0], True),
        (f"{VERSIONS[0]}.7", True),
        (f"{VERSIONS[0]}.0+cpu", True),
        (VERSIONS[1], False),
        (f"{VERSIONS[1]}.0rc1", False),
        ("1.0", False),
        ("0.4", False),
        ("dev", False),
    ],
)
def test_the_range(version: str, expected: bool):
    assert fits(version) is expected


def test_the_range_is_that_of_the_extra():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={VERSIONS[0]},<{VERSIONS[1]}"]
    plugins = [p for p in entry_points(group="vllm.general_plugins") if p.name == "besa"]
    assert [p.value for p in plugins] == ["besa.serve.vllm.plugin:register"]
