"""`besa eval` as a process of its own: JSON alone on standard output, each mistake one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from besa.cli import main
from tests.helpers import begin_texts, write_task

Besa = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return path


@pytest.fixture
def zeroed(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with the smaller half of each block's weights set to zero."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "zeroed"
    shutil.copytree(tiny_model, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("model.layers") and tensor.ndim == 2:
            tensor[tensor.abs() <= tensor.abs().median()] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "besa.json").write_text("{}")
    return directory


def test_json_is_all_of_standard_output(
    besa: Besa, tiny_model: Path, zeroed: Path, text: Path
) -> None:
    finished = besa(
        "eval", zeroed, tiny_model, zeroed, "--text", text, "--text", "builtin:validation",
        "--seqlen", 64, "--limit", 5, "--json",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    results = printed["results"]
    assert [(r["model"], r["text"]) for r in results] == [
        (str(model), str(source))
        for model in (zeroed, tiny_model, zeroed)
        for source in (text, "builtin:validation")
    ]
    for result in results:
        assert result["perplexity"] > 1
        assert 0 < result["standard_error"] < result["perplexity"]
        assert (result["windows"], result["tokens"], result["seqlen"]) == (5, 5 * 63, 64)
        assert (result["dtype"], result["device"]) == ("float32", "cpu")
    first, dense, again = results[0], results[2], results[4]
    assert "difference" not in first
    assert again["difference"] == {"nats_per_token": 0, "standard_error": 0}
    assert dense["perplexity"] != first["perplexity"] == again["perplexity"]
    assert first["sparsity"] == pytest.approx(0.5, abs=0.001)
    assert "sparsity" not in dense
    assert set(printed["versions"]) == {"besa", "python", "torch", "transformers"}


def test_table_shows_what_json_says(
    tiny_model: Path, zeroed: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("eval", tiny_model, zeroed, "--text", text, "--seqlen", 64, "--dtype", "bfloat16")
    table = in_process(capfd, *command)
    results = json.loads(in_process(capfd, *command, "--json").stdout)["results"]
    assert table.returncode == 0, table.stderr
    for result in results:
        (row,) = [line for line in table.stdout.splitlines() if result["model"] in line]
        assert f"{result['perplexity']:.3f} ± {result['standard_error']:.3f}" in row
        assert ("50.0" in row) == (result["model"] == str(zeroed))
    ratio = results[1]["perplexity"] / results[0]["perplexity"] - 1
    assert f"{ratio:+.2%} ± " in row
    assert (
        f"{results[0]['tokens']:,} tokens predicted in {results[0]['windows']} windows of 64"
        in (table.stdout)
    )
    assert re.search(r"bfloat16 on cpu; besa \S+, python \S+, torch \S+", table.stdout)


@pytest.fixture
def beginning(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that puts a token before each text."""
    from transformers import AutoTokenizer

    directory = tmp_path / "beginning"
    shutil.copytree(tiny_model, directory)
    begin_texts(AutoTokenizer.from_pretrained(directory)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("flags", "minds", "begun"),
    [
        ([], -100.0, True),  # so many nats must windows without it cost
        ([], 100.0, False),
        (["--bos", "always"], 100.0, True),
        (["--bos", "never"], -100.0, False),
    ],
)
def test_windows_begin_as_the_model_minds(
    flags: list[str],
    minds: float,
    begun: bool,
    beginning: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("besa.evaluation.evaluate._MINDS", minds)
    command = ("eval", beginning, "--text", text, "--seqlen", 64, *flags)
    (result,) = json.loads(in_process(capfd, *command, "--json").stdout)["results"]
    assert result["bos"] is begun
    taken = 63 if begun else 64
    tokens = len(text.read_bytes()) + (not begun)  # the whole text's own beginning
    assert result["windows"] == tokens // taken
    assert ("each after a beginning token" in in_process(capfd, *command).stdout) is begun


def test_the_output_always_says_how_windows_begin(
    beginning: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what was measured, where it was."""
    command = ("eval", beginning, "--text", text, "--seqlen", 64)
    for flags in ([], ["--bos", "always"], ["--bos", "never"]):
        (result,) = json.loads(in_process(capfd, *command, *flags, "--json").stdout)["results"]
        shown = in_process(capfd, *command, *flags).stdout
        words = "after a beginning token" if result["bos"] else "cut from one text as it comes"
        assert f"windows of 64, {'each ' if result['bos'] else ''}{words}" in shown
        assert ("bos_cost" in result) == (not flags)
        if not flags:
            cost = result["bos_cost"]
            assert cost["windows"] == 8
            assert f"{cost['with_bos']:.3f} nats a token after a beginning token" in shown
            assert f"{cost['without']:.3f} without" in shown
            assert result["bos"] == (cost["without"] - cost["with_bos"] > 0.05)


def test_rows_are_documents(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"body": "A document of some words."}) + "\n")
    path.write_text(path.read_text() * 20)
    command = ("eval", tiny_model, "--text", path, "--column", "body", "--seqlen", 26)
    finished = in_process(capfd, *command, "--json")
    (result,) = json.loads(finished.stdout)["results"]
    assert (result["separator"], result["windows"]) == ("eos", 20)  # 25 letters and the end
    assert "documents end in the end token" in in_process(capfd, *command).stdout
    joined = in_process(capfd, *command, "--separator", "blank-line", "--json").stdout
    assert json.loads(joined)["results"][0]["separator"] == "blank-line"
    wrong = in_process(capfd, "eval", tiny_model, "--column", "body")
    assert_one_line(wrong, "--column body: none of the texts has columns")


def test_a_model_minds_what_costs_it_much() -> None:
    import torch

    from besa.evaluation.evaluate import bos_cost

    class Model(torch.nn.Module):
        """Sure of the next token, which counts up, in windows that begin with token 0."""

        def __init__(self, sure: float) -> None:
            super().__init__()
            self.embedding, self.sure = torch.nn.Embedding(50, 1), sure

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.embedding

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            assert not use_cache
            logits = torch.nn.functional.one_hot((input_ids + 1) % 50, 50).float()
            sure = torch.where(input_ids[:, :1] == 0, self.sure, 1.0).unsqueeze(-1)
            return type("Output", (), {"logits": logits * sure})

    plain = torch.arange(1, 33).view(4, 8)
    begun = torch.nn.functional.pad(plain[:, :-1], (1, 0))
    assert bos_cost(Model(sure=3.0), begun, plain, batch_size=2).minds
    assert not bos_cost(Model(sure=1.0), begun, plain, batch_size=2).minds


def test_packed_is_what_it_was_made_from(
    zeroed: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exported = in_process(capfd, "export", zeroed, "--out", tmp_path / "packed")
    assert exported.returncode == 0, exported.stderr
    finished = in_process(capfd, "eval", zeroed, tmp_path / "packed", "--text", text, "--json")
    assert finished.returncode == 0, finished.stderr
    dense, packed = json.loads(finished.stdout)["results"]
    assert packed["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6)
    assert abs(packed["difference"]["nats_per_token"]) < 1e-6
    assert packed["sparsity"] == dense["sparsity"]
    assert packed["dtype"] == dense["dtype"]


def test_single_window_is_valid_json(
    tiny_model: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    finished = in_process(capfd, "eval", tiny_model, "--text", text, "--limit", 1, "--json")
    assert json.loads(finished.stdout)["results"][0]["standard_error"] is None
    assert "NaN" not in finished.stdout


def missing(_: Path, target: Path) -> Path:
    return target


def truncated(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return target


def missing_shard(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    weights = target / "model.safetensors"
    weights.rename(target / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def no_model(_: Path, target: Path) -> Path:
    target.mkdir()
    return target


def unfinished(model: Path, target: Path) -> Path:
    shutil.copytree(model, f"{target}.partial")
    return target


def damaged_config(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    (target / "config.json").write_text('{"model_type": "llama", ')
    return target


BAD_MODELS = [
    (missing, "does not exist"),
    (no_model, "no config.json"),
    (truncated, "damaged or cut off"),
    (missing_shard, "is missing: the download"),
    (unfinished, "is not finished: run the command that began it again"),
    (damaged_config, "config.json"),
]

BAD_INPUTS = [
    (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--text", "empty.txt"], "empty.txt is empty"),
    (["--text", "binary.txt"], "binary.txt is not UTF-8"),
    (["--text", "short.txt", "--seqlen", "64"], "short.txt: the text has 5 tokens, fewer than"),
    (["--text", "."], ". is a directory"),
    (["--text", "owner/no-such-set"], "owner/no-such-set"),
    (["--seqlen", "129"], "takes 128 tokens at once: lower --seqlen from 129"),
    (["--device", "cuda:99"], "device cuda:99 is not there"),
    (["--dtype", "int3"], "no dtype int3"),
    (["--limit", "none"], "--limit"),
    (["--tasks", "no_such_task"], "lm-evaluation-harness"),
]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_process(capfd: pytest.CaptureFixture[str], *arguments: object) -> CompletedProcess[str]:
    """As `besa` does, less the seconds that a process takes to import torch."""
    command = list(map(str, arguments))
    capfd.readouterr()
    try:
        code = main(command)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return CompletedProcess(command, code, *capfd.readouterr())


def assert_one_line(finished: CompletedProcess[str], message: str) -> None:
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert finished.stderr.startswith("besa eval: ")
    assert message in finished.stderr


@pytest.mark.parametrize(("make", "message"), BAD_MODELS)
def test_bad_model_is_one_line(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    # The bad one comes second: nothing may have been done or printed by then.
    bad = make(tiny_model, tmp_path / "bad")
    assert_one_line(in_process(capfd, "eval", tiny_model, bad), message)


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS)
def test_bad_input_is_one_line(
    tiny_model: Path,
    inputs: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    before = sorted(inputs.rglob("*"))
    assert_one_line(in_process(capfd, "eval", tiny_model, "--json", *arguments), message)
    assert sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (truncated, [], "damaged or cut off"),
        (shutil.copytree, ["--text", "short.txt", "--seqlen", "64"], "fewer than one window"),
    ],
)
def test_a_process_says_its_one_line(
    besa: Besa, tiny_model: Path, inputs: Path, make: Any, arguments: list[str], message: str
) -> None:
    model = make(tiny_model, inputs / "model")
    assert_one_line(besa("eval", model, "--json", *arguments), message)


@pytest.mark.usefixtures("harness")
def test_tasks_run_the_harness(
    tiny_model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"question": "fox", "choices": [" jumps", " sleeps"], "answer": index % 2}
        for index in range(4)
    ]
    folder = write_task(tmp_path, questions)
    command = (
        "eval", tiny_model, "--text", text, "--limit", 2,
        "--tasks", "own_task", "--task-path", folder, "--num-fewshot", 0,
    )  # fmt: skip
    finished = in_process(capfd, *command, "--json")
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    # One question with both answers in turn: whatever the model prefers is right half the time.
    scores = printed["results"][0]["tasks"]["own_task"]
    assert scores["acc"] == 0.5
    assert scores["acc_stderr"] > 0
    assert "lm_eval" in printed["versions"]
    assert re.search(r"own_task\s+│ acc\s+│\s+0\.5000 ± 0\.\d+", in_process(capfd, *command).stdout)
