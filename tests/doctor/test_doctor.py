"""`besa doctor` as a process of its own, and what it advises on machines that this one is not."""

from __future__ import annotations

import copy
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from besa import __version__
from besa.doctor.advice import advice
from besa.doctor.examine import PACKAGES
from besa.doctor.report import DoctorReport
from besa.kernels import native
from besa.kernels.isa import ISAS
from besa.typed_json import from_json
from tests.helpers import PATIENCE, REPOSITORY

WITHOUT_KERNELS = """
import sys
from besa.kernels import native
native.NAME = "libnone.so"
from besa.cli import main
sys.exit(main())
"""


def doctor(
    *options: str, code: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `besa doctor`, or `code` that does, with more in the environment."""
    start = ["-c", code] if code else ["-m", "besa"]
    own = {name: value for name, value in os.environ.items() if name not in ("BESA_ISA", "COLUMNS")}
    finished = subprocess.run(
        [sys.executable, *start, "doctor", *options],
        env={**own, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    finished = doctor("--json")
    assert finished.stdout.count("\n") == 1
    record: dict[str, Any] = json.loads(finished.stdout)
    return record


def kind(value: Any) -> Any:
    """Its type, and the types of what is in it."""
    if isinstance(value, dict):
        return {key: kind(each) for key, each in value.items()}
    return type(value)


NUMBER, TEXT, NONE = int, str, type(None)


@pytest.mark.slow
def test_json_has_every_key(record: dict[str, Any]):
    found = kind(record)
    assert found.pop("gpus") is list
    assert (found.pop("gpu_kernels") is NONE) == (not torch.cuda.is_available())
    assert found.pop("openmp") is list
    assert found.pop("warnings") is list
    assert set(found.pop("cpu_features").values()) <= {bool}
    assert set(found["versions"]) == {"python", *PACKAGES}
    assert set(found.pop("versions").values()) <= {TEXT, NONE}
    system = found.pop("system")
    assert system.pop("core_share") in (int, float, NONE)
    assert system.pop("omp_num_threads") in (TEXT, NONE)
    assert system.pop("cache") in (NUMBER, NONE)
    assert system["memory"].pop("limit") in (NUMBER, NONE)
    assert system == {
        "os": TEXT,
        "architecture": TEXT,
        "cpu": TEXT,
        "cores": NUMBER,
        "threads": NUMBER,
        "memory": {"total": NUMBER, "available": NUMBER, "swap_used": NUMBER},
    }
    native_record = found.pop("native")
    assert set(native_record) == {"path", "problem"}
    assert set(native_record.values()) == {TEXT, NONE}
    assert found.pop("busy_cores") in (float, NONE)
    assert found.pop("dense_against_sparse") is list
    assert found == {
        "record_version": NUMBER,
        "besa": TEXT,
        "prefix": TEXT,
        "kernel": {"isa": TEXT, "reason": TEXT},
        "read_bandwidth": {"bytes_per_second": float, "threads": NUMBER},
    }
    figures = record["dense_against_sparse"]
    assert [figure["dtype"] for figure in figures] == ["bfloat16", "int8", "int4"]
    for figure in figures:
        assert kind(figure) == {
            "tokens": NUMBER,
            "rows": NUMBER,
            "cols": NUMBER,
            "sparsity": float,
            "dtype": TEXT,
            "threads": NUMBER,
            "dense_seconds": float,
            "sparse_seconds": float,
            "speedup": float,
            "bytes": NUMBER,
            "share_of_read_bandwidth": float,
        }


@pytest.mark.slow
def test_what_it_says_is_so(record: dict[str, Any]):
    assert record["besa"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["system"]["threads"] == int(os.environ["OMP_NUM_THREADS"])
    assert record["system"]["omp_num_threads"] == os.environ["OMP_NUM_THREADS"]
    assert 0 < record["system"]["memory"]["available"] <= record["system"]["memory"]["total"]
    assert 1e8 < record["read_bandwidth"]["bytes_per_second"] < 1e13
    if native.library() is not None:
        assert Path(record["native"]["path"]).name == native.NAME
        assert record["kernel"]["isa"] in ISAS
    for figure, bits in zip(record["dense_against_sparse"], (9, 5, 3.15), strict=True):
        assert figure["speedup"] == figure["dense_seconds"] / figure["sparse_seconds"]
        assert figure["bytes"] * 8 / 4096**2 == pytest.approx(bits, rel=0.01)
    assert all(isinstance(line, str) and "\n" not in line for line in record["warnings"])


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason="there are no native kernels to choose from")
def test_lines_fit_the_terminal_and_besa_isa_is_respected():
    """On a pipe: no colours either."""
    finished = doctor(COLUMNS="80", BESA_ISA="portable", OMP_NUM_THREADS="1")
    lines = finished.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in finished.stdout
    shown = re.sub(r"\s+", " ", finished.stdout)
    assert "threads 1 (OMP_NUM_THREADS=1)" in shown
    assert "kernels portable: BESA_ISA=portable" in shown
    assert "warning: BESA_ISA=portable may hold the kernels back" in shown
    assert re.search(r"reading \d+\.\d GB/s from memory, 1 thread\b", shown)
    assert re.search(
        r"4096×4096, 50% zeros: F\.linear \S+ ms bfloat16 \S+ ms "
        r"\(\d+\.\d×, \d+% of the read limit\) int8 .* int4 \S+ ms \(",
        shown,
    )
    assert f"torch {torch.__version__}" in shown


@pytest.mark.slow
def test_a_wrong_besa_isa_is_a_warning_and_no_crash():
    record = json.loads(doctor("--json", BESA_ISA="sse9").stdout)
    if record["native"]["path"]:
        assert record["kernel"]["isa"] is None
        assert record["dense_against_sparse"] == []
    assert any("BESA_ISA=sse9" in line for line in record["warnings"])


@pytest.mark.slow
def test_missing_kernels_are_a_warning_and_no_crash():
    finished = doctor("--json", code=WITHOUT_KERNELS)
    record = json.loads(finished.stdout)
    problem = "libnone.so was not built with this installation"
    assert record["native"] == {"path": None, "problem": problem}
    assert record["kernel"]["isa"] == "torch"
    assert record["dense_against_sparse"][0]["sparse_seconds"] > 0
    (line,) = (x for x in record["warnings"] if "native kernels" in x)
    assert problem in line
    assert "install a C++ compiler" in line


@pytest.mark.slow
def test_on_a_terminal(tmp_path: Path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "besa", "doctor"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "60"},
        cwd=tmp_path,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(PATIENCE) == 0, shown.decode()
    assert "measuring" in shown.decode()
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode().split("\x1b[2K")[-1])
    assert words.splitlines()[0].split()[:2] == ["besa", f"{__version__},"]
    assert max(map(len, words.splitlines())) <= 60


# ---------------------------------------------------------------------------------- advice


HEALTHY: dict[str, Any] = {
    "besa": "1.0",
    "system": {
        "os": "Linux 6.1",
        "architecture": "x86_64",
        "cpu": "a CPU",
        "cores": 8,
        "core_share": None,
        "threads": 8,
        "omp_num_threads": None,
        "cache": None,
        "memory": {"total": 2**34, "available": 2**33, "limit": None, "swap_used": 0},
    },
    "cpu_features": {},
    "gpus": [],
    "prefix": "/usr",
    "versions": {},
    "read_bandwidth": {"bytes_per_second": 1e10, "threads": 8},
    "dense_against_sparse": [],
    "native": {"path": "/lib.so", "problem": None},
    "kernel": {"isa": "avx2", "reason": "the best that this CPU has"},
    "openmp": ["/torch/libgomp.so.1"],
    "busy_cores": 0.1,
}

ILLS = {
    "no library": ({"native": {"problem": "gone"}}, r"\(gone\).*install a C\+\+ compiler"),
    "isa": (
        {"kernel": {"reason": "BESA_ISA=avx2", "overridden": True}},
        "BESA_ISA=avx2 may hold .* back: unset it",
    ),
    "wrong isa": (
        {"kernel": {"isa": None, "reason": "BESA_ISA=x is none of y"}},
        "BESA_ISA=x is none of y: unset it, or correct it",
    ),
    "two runtimes": ({"openmp": ["/a/libgomp.so.1", "/b/libiomp5.so"]}, r"2 OpenMP .*/b/libiomp5"),
    "threads": ({"system": {"threads": 16}}, "16 threads share 8 cores: set OMP_NUM_THREADS=8"),
    "container": ({"system": {"core_share": 1.5}}, r"8 threads share 1\.5 cores: .*THREADS=1$"),
    "less than one": ({"system": {"core_share": 0.5}}, r"8 threads share 0\.5 cores: .*THREADS=1$"),
    "busy": ({"busy_cores": 3.94}, r"other programs kept 3\.9 cores busy .*try again"),
    "swap": ({"system": {"memory": {"swap_used": 3 * 2**30}}}, r"3\.0 GiB of swap are in use"),
}


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        record[key] = changed(record[key], value) if isinstance(value, dict) else value
    return record


@pytest.mark.parametrize("ill", ILLS)
def test_each_ill_has_its_advice(ill: str):
    changes, expected = ILLS[ill]
    (line,) = advice(from_json(DoctorReport, changed(copy.deepcopy(HEALTHY), changes)))
    assert re.search(expected, line)


def test_a_healthy_machine_needs_none():
    assert advice(from_json(DoctorReport, HEALTHY)) == []
