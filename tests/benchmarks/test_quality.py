"""What benchmarks/quality.py measures of besa's models, and the pictures of a record."""

from __future__ import annotations

import argparse
import json
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from besa import PruneConfig, prune
from besa.evaluation.config import EvalConfig
from besa.evaluation.evaluate import evaluate
from tests.benchmarks.conftest import ROOT, Script


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def row(engine: str, name: str, bits: float, perplexity: float) -> dict[str, Any]:
    return {
        "engine": engine,
        "name": name,
        "perplexity": perplexity,
        "losses": [perplexity],
        "worse": {"nats": perplexity / 40 - 1, "standard_error": 0.01},
        "linears": {"weights": 800, "bytes": int(bits * 100)},
        "others": {"weights": 800, "bytes": 1600},
    }


RECORD = {
    "name": "A model",
    "text": "test.txt",
    "calibration": "valid.txt",
    "samples": 64,
    "seqlen": 512,
    "tokens": 16352,
    "conditions": {"cpu": "a CPU", "cores": 2, "torch": "2", "llama-cpp-python": "0.3"},
    "rows": [
        row("besa", "dense", 16, 40),
        row("llama.cpp", "BF16", 16, 40.01),
        row("llama.cpp", "Q8_0", 8.5, 40.1),
        row("besa", "50%", 9.1, 53),
        row("besa", "50% int4", 3.1, 58),
        row("llama.cpp", "IQ3_XXS", 3.1, 70),
    ],
}


def test_the_front_is_what_no_other_model_beats():
    import quality_report

    points = quality_report.by_bits(RECORD, "linears")
    assert [one.name for one in quality_report.front(points)] == ["50% int4", "Q8_0", "dense"]
    fast = [quality_report.Point("", str(tps), tps, p) for tps, p in ((9, 50), (5, 40), (4, 41))]
    assert [one.name for one in quality_report.front(fast, -1)] == ["9", "5"]


def test_a_table_and_a_picture():
    import quality_report

    lines = quality_report.quality_table(RECORD).splitlines()
    assert "| besa 50% | 53.00 | 0.325 ± 0.010 | 9.10 | 12.55 | 0 MiB |" in lines
    assert "| besa 50% int4 | 58.00 | 0.450 ± 0.010 | **3.10** | **9.55** | 0 MiB |" in lines
    assert "| besa dense | 40.00 | – | **16.00** | **16.00** | 0 MiB |" in lines
    behind = "besa's 50% is behind it."
    front = "By the bits of the linears the front is besa 50% int4, llama.cpp Q8_0, dense;"
    assert any(front in line and behind in line for line in lines)
    picture = ET.fromstring(quality_report.plot(RECORD))
    words = [one.text for one in picture.iter() if one.tag.endswith("text")]
    for each in RECORD["rows"]:
        assert words.count(each["name"]) == (0 if each["name"] == "BF16" else 2)


def test_names_stand_beside_each_other():
    import quality_report

    points = [(100.0, 100.0, "one"), (102.0, 101.0, "another"), (101.0, 99.0, "a third")]
    spots = quality_report.labels(points, 0, 460)
    boxes = [
        quality_report._box(spot, quality_report.LETTER * len(name))
        for spot, (_, _, name) in zip(spots, points, strict=True)
    ]
    for i, box in enumerate(boxes):
        assert not any(quality_report._meet(box, other) for other in boxes[i + 1 :])


@pytest.mark.slow
def test_besas_half(tmp_path: Path, tiny_model: Path, script: Script):
    """Perplexities are those of `besa eval`, and bytes those of the files."""
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    settings = {"method": "magnitude", "samples": 4, "seqlen": 32}
    prune(tiny_model, PruneConfig(out=pruned / "besa-50", **settings))
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    out = tmp_path / "quality.json"

    def measure(*only: str) -> dict[str, Any]:
        files = ["--model", tiny_model, "--pruned", pruned, "--calibration", text, "--text", text]
        sizes = ["--name", "A model", "--seqlen", 32, "--limit", 4]
        script("quality", "--work", "work", *files, *sizes, "--json", out, "--only", *only)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    measure("dense")
    dense, half = measure("50%", "30%")["rows"]  # the dense one stays, 30% is not there
    assert (dense["name"], half["name"]) == ("dense", "50%")
    config = EvalConfig(texts=(str(text),), seqlen=32, bos="never", dtype="float32", limit=4)
    for each, path in ((dense, tiny_model), (half, tmp_path / "work" / "besa-50")):
        (result,) = evaluate([str(path)], config)
        assert each["perplexity"] == pytest.approx(result.perplexity.perplexity)
        tensors = [x for file in path.glob("*.safetensors") for x in load_file(file).values()]
        size = sum(tensor.nbytes for tensor in tensors)
        assert each["linears"]["bytes"] + each["others"]["bytes"] == size
    assert dense["worse"]["nats"] == 0
    assert half["linears"]["weights"] == dense["linears"]["weights"]
    assert half["linears"]["bytes"] < dense["linears"]["bytes"]
    assert half["others"] == dense["others"]


def test_the_windows_are_those_of_eval(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    import quality

    from besa.evaluation import evaluate as module
    from besa.model.loading import load_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    args = argparse.Namespace(model=tiny_model, text=text, seqlen=32, limit=4)
    config = EvalConfig(texts=(str(text),), seqlen=32, limit=4)
    tokenizer = load_tokenizer(tiny_model)
    for token in (None, 7):
        monkeypatch.setattr(quality, "beginning", lambda _, token=token: token)
        expected = module.windows_of(tokenizer, str(text), 32, config, token)
        assert torch.equal(quality.windows_of(args), expected)


def test_a_loss_of_logits_is_their_cross_entropy(monkeypatch: pytest.MonkeyPatch):
    for absent in ("gguf", "llama_cpp"):  # they are not installed beside besa
        monkeypatch.setitem(sys.modules, absent, types.ModuleType(absent))
    import gguf_losses

    torch.manual_seed(0)
    logits, targets = 20 * torch.randn(150, 300), torch.randint(300, (150,))
    expected = torch.nn.functional.cross_entropy(logits, targets)
    found = gguf_losses.loss(logits.numpy(), targets.numpy())
    assert found == pytest.approx(float(expected), rel=1e-5)
