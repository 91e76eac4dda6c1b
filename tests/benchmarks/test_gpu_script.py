"""The script for GPU machines runs where there is none, with an installation's bare minimum."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_script_on_the_cpu(tmp_path, environment):
    environment["OUT"] = str(tmp_path)
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--tiny", "--device", "cpu"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert all(check["passed"] for check in result["checks"])
    assert {run["method"].split()[0] for run in result["methods"]} == {
        "magnitude",
        "wanda",
        "sparsegpt",
        "besa",
    }
    for run in result["methods"]:
        assert run["zeros"] == run["zeros_wanted"]
        assert run["error"] > 0
    assert json.loads((tmp_path / "allocation-cpu.json").read_text())["results"]


def test_needs_no_more_than_torch_transformers_safetensors(environment):
    """rich and jinja2 come with besa's installation, which a bare machine may lack."""
    code = (
        "import sys\n"
        "for name in ('rich', 'jinja2', 'markupsafe'): sys.modules[name] = None\n"
        "import gpu, allocation"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", env=environment, check=True
    )


def test_says_that_there_is_no_gpu(environment, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--json", tmp_path / "gpu.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "torch sees no GPU: give --device cpu"
