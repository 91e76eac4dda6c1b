"""The script for GPU machines runs where there is none, with an installation's bare minimum."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def run_script(environment, out, *arguments):
    environment["OUT"] = str(out)
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *arguments],
        cwd=out,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_script_on_the_cpu(tmp_path, environment):
    done = run_script(environment, tmp_path, "--tiny", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(records) == {"kernels", "decode-tiny", "pruning", "allocation-cpu"}
    assert all(record["finished"] for record in records.values())

    pruning = records["pruning"]
    assert all(check["passed"] for check in pruning["checks"])
    assert {run["method"].split()[0] for run in pruning["methods"]} == {
        "magnitude",
        "wanda",
        "sparsegpt",
        "besa",
    }
    for run in pruning["methods"]:
        assert run["zeros"] == run["zeros_wanted"]
        assert run["error"] > 0
    assert records["allocation-cpu"]["results"]

    for row in [*records["kernels"]["rows"], *records["decode-tiny"]["rows"]]:
        assert row["right"], row
    assert {row["kind"] for row in records["kernels"]["rows"]} > {"50%", "70%", "2:4", "int8 50%"}
    passes = [row for row in records["decode-tiny"]["rows"] if row["what"] != "model"]
    assert {row.get("batch") for row in passes} == {1, 2, None}
    assert all(row["tokens_a_second"] > 0 for row in passes)

    last = done.stdout.strip().splitlines()[-1].split()  # all checks of all parts
    assert last[:2] == ["checks", "all"]
    assert last[-1] == "ok"

    again = run_script(environment, tmp_path, "--tiny", "--device", "cpu", "--half", "2")
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("is there") == 3
    assert "kernels.json is there" not in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "unknown option --fast"),
        (["--half", "3"], "unknown half 3"),
        (["--parts", "kernels,decoding"], "unknown part in kernels,decoding"),
        (["--parts"], "--parts needs a value"),
    ],
)
def test_says_what_it_does_not_know(tmp_path, environment, arguments, message):
    done = run_script(environment, tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout.startswith(f"gpu.sh: {message} (--device")


def test_needs_no_more_than_torch_transformers_safetensors(environment):
    """rich and jinja2 come with besa's installation, which a bare machine may lack."""
    code = (
        "import sys\n"
        "for name in ('rich', 'jinja2', 'markupsafe'): sys.modules[name] = None\n"
        "import gpu, allocation, gpu_kernels, gpu_decode, gpu_report"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", env=environment, check=True
    )


@pytest.mark.parametrize("script", ["gpu", "gpu_kernels", "gpu_decode"])
def test_says_that_there_is_no_gpu(environment, tmp_path, script):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--json", tmp_path / "gpu.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "torch sees no GPU: give --device cpu"
