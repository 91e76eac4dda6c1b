"""`besa prune` as users type it: what it writes, what it shows, and what it says to bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import (
    PATIENCE,
    REPOSITORY,
    Process,
    everything,
    load_strictly,
    random_model,
    run,
    same_bytes,
    save_with_tokenizer,
    stored,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text("".join(f"The {n}th sentence, of {n % 7} kinds.\n" for n in range(150)))
    return path


def quick(text: Path) -> list[object]:
    """The options of a run that takes a moment."""
    return [
        *("--calibration", text, "--samples", 8, "--seqlen", 32),
        *("--epochs", 2, "--device", "cpu"),
    ]


# ------------------------------------------------------------------------------- a good run


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Process]:
    """A run with the default method, and its process."""
    directory = tmp_path_factory.mktemp("good")
    process = run("prune", tiny_model, "--out", "pruned", *quick(text), cwd=directory)
    assert process.returncode == 0, process.errors
    return directory / "pruned", process


@pytest.mark.slow
def test_end_to_end(besa: Callable[..., Any], tiny_model: Path, tmp_path: Path):
    """Without the tests' short cuts: a new interpreter, the built-in corpus."""
    process = besa(
        *("prune", tiny_model, "--out", tmp_path / "deep" / "pruned", "--sparsity", "0.6"),
        *("--samples", 4, "--seqlen", 64, "--epochs", 1, "--method", "wanda"),
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert "weights pruned (59.9998%)" in process.stdout  # the nearest whole number of weights
    model = load_strictly(tmp_path / "deep" / "pruned")
    zeros = sum(int((p == 0).sum()) for p in model.model.layers.parameters())
    record = json.loads((tmp_path / "deep" / "pruned" / "besa.json").read_text())
    assert zeros == record["sparsity"]["zeros"] == round(0.6 * record["sparsity"]["weights"])


def test_last_line_says_what_came_of_it(finished: tuple[Path, Process], tiny_model: Path):
    _, process = finished
    (line,) = process.output.splitlines()
    assert line.startswith("pruned: ")
    assert "(50.0000%)" in line
    assert "pruned/report.html" in line
    weights = sum(t.numel() for key, t in stored(tiny_model).items() if "proj" in key)
    assert f"{weights // 2:,} of {weights:,} weights" in line


def test_plain_lines_where_there_is_no_terminal(finished: tuple[Path, Process]):
    _, process = finished
    lines = process.errors.splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.match(
            rf"block {number}/3  model\.layers\.{number - 1}: \d+\.\d\d% zeros, "
            r"error \d+\.\d+% \(Wanda \d+\.\d+%\)",
            line,
        )
    assert "\x1b" not in process.errors


@pytest.mark.slow
def test_live_line_on_a_terminal(tiny_model: Path, text: Path, tmp_path: Path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "besa", "prune", tiny_model, "--out", tmp_path / "out"]
        + [str(option) for option in [*quick(text), "--epochs", 100]],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "120"},
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
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for number in (1, 2, 3):
        assert f"block {number}/3" in words
        assert f"model.layers.{number - 1}: " in words
    assert "loss " in words
    assert "50.0000%" in words
    assert "Traceback" not in words


def test_log_is_a_json_object_a_line(finished: tuple[Path, Process]):
    out, _ = finished
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all({"time", "block", "blocks", "phase"} <= event.keys() for event in events)
    assert [e["block"] for e in events if e["phase"] == "written"] == [0, 1, 2]
    learned = [event for event in events if event["phase"] == "learn"]
    assert learned
    assert all(event["loss"] > 0 and 0 < event["rate"] < 1 for event in learned)


# ------------------------------------------------------------------------- what is in it


def test_the_directory_is_a_whole_model(finished: tuple[Path, Process], tiny_model: Path):
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md",
        "besa.json",
        "config.json",
        "generation_config.json",
        "log.jsonl",
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for key, file in index["weight_map"].items():
        assert key in load_file(out / file)
    assert index["weight_map"].keys() == stored(tiny_model).keys()
    assert not list(out.parent.glob("*.partial"))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokens = model.generate(**tokenizer("One", return_tensors="pt"), max_new_tokens=5)
    assert tokens.shape[1] > 3


def test_besa_json_has_all_that_is_promised(finished: tuple[Path, Process], tiny_model: Path):
    import hashlib

    out, _ = finished
    record = json.loads((out / "besa.json").read_text())
    assert record["format"] == 1
    assert record["model"] == str(tiny_model)
    assert record["architecture"] == "LlamaForCausalLM"
    assert {"besa", "python", "torch", "transformers", "safetensors"} <= record["versions"].keys()
    assert record["device"] == "cpu"
    assert record["dtype"] == "float32"
    assert record["threads"] >= 1
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 2**20
    assert (
        record["settings"]
        | {
            "method": "besa",
            "sparsity": 0.5,
            "pattern": "unstructured",
            "granularity": "row",
            "samples": 8,
            "seqlen": 32,
            "epochs": 2,
            "seed": 0,
        }
        == record["settings"]
    )
    for file, digest in record["digests"].items():
        assert hashlib.sha256((out / file).read_bytes()).hexdigest() == digest
    assert len(record["digests"]) == 4

    weights = stored(out)
    assert [block["index"] for block in record["blocks"]] == [0, 1, 2]
    for block in record["blocks"]:
        assert block["error"] > 0
        assert block["error_wanda"] > 0
        assert block["seconds"] > 0
        assert len(block["loss"]) == 2
        assert block["zeros"] == sum(linear["zeros"] for linear in block["linears"])
        assert len(block["linears"]) == 7
        for linear in block["linears"]:
            zeros = weights[f"{block['name']}.{linear['name']}.weight"] == 0
            assert linear["shape"] == list(zeros.shape)
            assert linear["zeros"] == int(zeros.sum())
            rates = zeros.double().mean(1)
            assert linear["sparsity"] == pytest.approx(float(rates.mean()))
            assert linear["rows"]["min"] == pytest.approx(float(rates.min()))
            assert linear["rows"]["mean"] == pytest.approx(float(rates.mean()))
            assert linear["rows"]["max"] == pytest.approx(float(rates.max()))
            assert sum(linear["rows"]["histogram"]) == len(rates)
    total = sum(block["zeros"] for block in record["blocks"])
    assert record["sparsity"]["zeros"] == total
    assert record["sparsity"]["achieved"] == record["sparsity"]["target"] == 0.5


def test_readme_is_a_model_card(finished: tuple[Path, Process], tiny_model: Path):
    out, _ = finished
    card = (out / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert "base_model" in front
    assert "50" in body
    assert "BESA" in body
    assert str(tiny_model.parent) not in card  # nobody's folders are published


def test_report_needs_nothing_else(finished: tuple[Path, Process]):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "<svg" in page
    assert "model.layers.0" in page or "q_proj" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"'](?!data:)", page)
    assert not re.search(r"url\((?![\"']?(data:|#))|@import", page)


def test_extra_files_of_the_model_travel(tiny_model: Path, text: Path, tmp_path: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "vocab.txt").write_text("a\n")
    (model / "README.md").write_text("The source's own card.")
    (model / "besa.json").write_text('{"format": 0}')
    (model / "pytorch_model.bin").write_bytes(b"another format of the weights")
    process = run(
        *("prune", model, "--out", "out", "--method", "magnitude", *quick(text)), cwd=tmp_path
    )
    assert process.returncode == 0, process.errors
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out/vocab.txt").exists()
    assert "own card" not in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/besa.json").read_text())["format"] == 1
    assert not (tmp_path / "out/pytorch_model.bin").exists()


def test_a_pruned_model_can_be_pruned_further(
    finished: tuple[Path, Process], text: Path, tmp_path: Path
):
    out, _ = finished
    arguments = ("prune", out, "--out", "more", "--sparsity", 0.7, *quick(text))
    process = run(*arguments, "--method", "wanda", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    record = json.loads((tmp_path / "more/besa.json").read_text())
    assert record["sparsity"]["zeros"] == round(0.7 * record["sparsity"]["weights"])


def test_unrouted_experts_are_told(tiny_model: Path, text: Path, tmp_path: Path):
    made = random_model("gpt_oss")
    with torch.no_grad():
        for layer in made.model.layers:
            layer.mlp.router.bias[3] = -1e4
    save_with_tokenizer(made, tmp_path / "model", tiny_model)
    process = run(
        *("prune", "model", "--out", "out", "--method", "wanda", *quick(text)), cwd=tmp_path
    )
    assert process.returncode == 0, process.errors
    notes = process.output.splitlines()[1:]
    assert notes
    assert all(re.search(r"experts 3; .*magnitude", note) for note in notes)
    assert "magnitude" in (tmp_path / "out/README.md").read_text()


# ----------------------------------------------------------------------------- quick help


def test_the_parser_needs_no_torch():
    code = (
        "import sys; from besa.cli import build_parser; build_parser();"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_help(besa: Callable[..., Any]):
    process = besa("prune", "--help")
    assert process.returncode == 0
    assert process.stderr == ""
    for flag in ("--out", "--method", "--sparsity", "--pattern", "--calibration", "--overwrite"):
        assert flag in process.stdout
    assert "goes on" in process.stdout


# -------------------------------------------------------------------------------- bad input


@dataclass
class Bad:
    """A working command in a directory of its own, to be spoilt."""

    directory: Path
    model: Path  # a copy
    text: Path

    def config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def index(self, text: str | None = None) -> dict[str, str]:
        """Adds an index to the one file; gives its map."""
        path = self.model / "model.safetensors.index.json"
        weight_map = dict.fromkeys(stored(self.model), "model.safetensors")
        path.write_text(text or json.dumps({"metadata": {}, "weight_map": weight_map}))
        return weight_map

    def run(self, *options: object) -> Process:
        """Without --out among the options, it is `out`."""
        out = () if "--out" in options else ("--out", "out")
        method = () if "--method" in options else ("--method", "wanda")
        arguments = ("prune", "model", *out, *quick(self.text), *method, *options)
        return run(*arguments, cwd=self.directory)


@pytest.fixture
def bad(tiny_model: Path, text: Path, tmp_path: Path) -> Bad:
    return Bad(tmp_path, Path(shutil.copytree(tiny_model, tmp_path / "model")), text)


def refused(process: Process) -> str:
    """The one line of a command that could not be."""
    assert process.returncode == 2, process.errors
    assert process.output == ""
    (line,) = process.errors.splitlines()
    assert re.match(r"besa( prune)?: ", line)
    return line


def refused_untouched(bad: Bad, *options: object) -> str:
    """The same, and nothing was written."""
    before = everything(bad.directory)
    line = refused(bad.run(*options))
    after = everything(bad.directory)
    for name in ("stdout-0", "stderr-0"):
        after.pop(name)
    assert after == before
    return line


OPTIONS = {
    "sparsity 0": (["--sparsity", 0], "sparsity 0.0 is not between 0 and 1"),
    "sparsity 1": (["--sparsity", 1], "sparsity 1.0 is not between"),
    "sparsity 1.5": (["--sparsity", 1.5], "sparsity 1.5 is not between"),
    "sparsity -0.1": (["--sparsity=-0.1"], "sparsity -0.1 is not between"),
    "sparsity nan": (["--sparsity", "nan"], "sparsity nan is not between"),
    "sparsity word": (["--sparsity", "half"], "--sparsity: invalid float value: 'half'"),
    "update": (["--update", "sgd"], "update 'sgd': choose one of auto, none, obs, admm, learn"),
    "few samples": (["--update", "learn", "--samples", 7], "of 7 samples none .* --samples 8"),
    "teacher": (["--teacher", "student"], "teacher 'student': choose one of dense, pruned"),
    "bos": (["--bos", "maybe"], "bos 'maybe': choose one of auto, always, never"),
    "pattern 4:2": (["--pattern", "4:2"], "pattern 4:2: .* 0 < N < M"),
    "pattern 2:2": (["--pattern", "2:2"], "0 < N < M"),
    "pattern 0:4": (["--pattern", "0:4"], "0 < N < M"),
    "pattern x": (["--pattern", "x"], "pattern 'x': give `unstructured` or N:M"),
    "pattern 2:4:8": (["--pattern", "2:4:8"], "pattern '2:4:8'"),
    "contradiction": (["--pattern", "2:4", "--sparsity", 0.6], "sparsity 0.6 contradicts .* 2:4"),
    "indivisible": (["--pattern", "2:6"], r"model\.layers\.0\.self_attn\.q_proj has 64 inputs.* 6"),
    "method": (["--method", "prayer"], "method 'prayer': choose one of besa, wanda"),
    "granularity": (["--granularity", "cell"], "granularity 'cell'"),
    "dtype": (["--dtype", "int8"], "dtype 'int8'"),
    "activations": (["--activations", "cloud"], "activations 'cloud'"),
    "samples": (["--samples", 0], "samples 0 is not positive"),
    "seqlen": (["--seqlen", 0], "seqlen 0 is not positive"),
    "epochs": (["--epochs", 0], "epochs 0 is not positive"),
    "too long": (["--seqlen", 129], "128 tokens at once"),
    "too many": (["--samples", 100_000], r"windows of 32 tokens, not 100000"),
    "flag": (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    "include": (["--include", "nowhere"], "leave no linear to prune"),
    "exclude": (["--exclude", "."], "leave no linear to prune"),
    "include regex": (["--include", "("], r"include '\('"),
    "exclude regex": (["--exclude", "*"], r"exclude '\*'"),
    "no device": (["--device", "nonsense"], "device nonsense is not there"),
    "meta device": (["--device", "meta"], "device meta is not there"),
    "empty out": (["--out", ""], "--out"),
    "calibration nowhere": (["--calibration", "none.txt"], r"none\.txt does not exist"),
    "calibration folder": (["--calibration", "model"], "model is a directory"),
    "calibration kind": (["--calibration", "model/model.safetensors"], "unknown suffix"),
    "calibration id": (["--calibration", "nobody/nothing"], "nobody/nothing"),
    "calibration split": (["--calibration", "builtin:none"], "builtin:none"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(bad: Bad, name: str):
    options, message = OPTIONS[name]
    assert re.search(message, refused_untouched(bad, *options))


def test_no_out(tiny_model: Path, tmp_path: Path):
    assert "--out" in refused(run("prune", tiny_model, cwd=tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu(bad: Bad, device: str):
    assert f"device {device} is not there" in refused_untouched(bad, "--device", device)


def test_an_indivisible_linear_can_be_left_out_as_advised(bad: Bad):
    line = refused_untouched(bad, "--pattern", "3:128")
    assert "q_proj has 64 inputs" in line
    options: list[str] = []
    while (process := bad.run("--pattern", "3:128", *options)).returncode:
        advised = re.search(r"--exclude '(.*?)'", refused(process))
        assert advised
        options = ["--exclude", "|".join([*options[1:], advised[1]])]
    record = json.loads((bad.directory / "out/besa.json").read_text())
    names = {linear["name"] for block in record["blocks"] for linear in block["linears"]}
    assert names == {"mlp.down_proj"}  # the only one with 128 inputs


TEXTS = {
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b" \n\n ", "blank.txt is empty"),
    "short.txt": (b"Too few words.", r"has 0 windows of 32 tokens, not 8"),
    "latin.txt": ("Grüße ".encode("latin-1") * 200, "latin.txt is not UTF-8"),
    "chats.jsonl": (
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n' * 99,
        "chats.jsonl holds chats, and the tokenizer has no chat template",
    ),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2"),
    "other.jsonl": (b'{"words": "a"}\n', "no field `text`"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bad_calibration(bad: Bad, name: str):
    data, message = TEXTS[name]
    (bad.directory / name).write_bytes(data)
    assert re.search(message, refused_untouched(bad, "--calibration", name))


def test_a_tokenizer_with_more_tokens_than_the_model(bad: Bad):
    small = random_model("llama", vocab_size=100)
    small.save_pretrained(bad.model)
    message = "the tokenizer gives tokens beyond the model's 100: it is another's"
    assert message in refused_untouched(bad)


def test_calibration_on_rows_with_broken_characters(bad: Bad):
    rows = [{"body": f"The {n}th sentence of \ud83d kinds.", "n": n} for n in range(60)]
    path = bad.directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = bad.run("--calibration", "rows.jsonl", "--column", "body")
    assert process.returncode == 0, process.errors
    said = [line for line in process.errors.splitlines() if line.startswith("besa prune: ")]
    assert len(said) == 1
    assert re.search(r"rows\.jsonl: \d+ broken characters were replaced by U\+FFFD", said[0])
    settings = json.loads((bad.directory / "out/besa.json").read_text())["settings"]
    assert (settings["column"], settings["separator"]) == ("body", "auto")


def test_calibration_that_may_not_be_read(bad: Bad):
    path = bad.directory / "secret.txt"
    path.write_text("Some words. " * 100)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    assert "secret.txt cannot be read" in refused_untouched(bad, "--calibration", path)


# Each spoils the model and gives what the line must say.
Spoil = Callable[[Bad], str]


def no_model(bad: Bad) -> str:
    shutil.rmtree(bad.model)
    return "model does not exist"


def a_file(bad: Bad) -> str:
    shutil.rmtree(bad.model)
    bad.model.write_text("")
    return "model is a file"


def empty_directory(bad: Bad) -> str:
    shutil.rmtree(bad.model)
    bad.model.mkdir()
    return "model is no model: it has no config.json"


def broken_config(bad: Bad) -> str:
    (bad.model / "config.json").write_text('{"model_type": "lla')
    return r"config\.json"


def empty_config(bad: Bad) -> str:
    (bad.model / "config.json").write_text("{}")
    return r"config\.json"


def unknown_type(bad: Bad) -> str:
    bad.config(model_type="unheard-of")
    return r"config\.json: .*unheard-of"


def no_weights(bad: Bad) -> str:
    (bad.model / "model.safetensors").unlink()
    return "has no safetensors weights"


def other_format(bad: Bad) -> str:
    (bad.model / "model.safetensors").rename(bad.model / "pytorch_model.bin")
    return "has no safetensors weights"


def truncated(bad: Bad) -> str:
    path = bad.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return r"model\.safetensors is damaged or cut off"


def truncated_header(bad: Bad) -> str:
    path = bad.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    return r"model\.safetensors is damaged or cut off"


def empty_file(bad: Bad) -> str:
    (bad.model / "model.safetensors").write_bytes(b"")
    return r"model\.safetensors is damaged or cut off"


def missing_shard(bad: Bad) -> str:
    weight_map = bad.index()
    weight_map["lm_head.weight"] = "model-2.safetensors"
    bad.index(json.dumps({"weight_map": weight_map}))
    return r"model-2\.safetensors is missing"


def cut_index(bad: Bad) -> str:
    bad.index('{"weight_map": {"lm_head')
    return r"index\.json is damaged"


def index_without_map(bad: Bad) -> str:
    bad.index('{"metadata": {}}')
    return r"index\.json is damaged"


def index_of_another_kind(bad: Bad) -> str:
    bad.index('["weight_map"]')
    return r"index\.json is damaged"


def index_with_a_tensor_too_many(bad: Bad) -> str:
    weight_map = bad.index()
    weight_map["model.layers.9.what.weight"] = "model.safetensors"
    bad.index(json.dumps({"weight_map": weight_map}))
    return r"lacks the tensor model\.layers\.9\.what\.weight"


def quantized(bad: Bad) -> str:
    bad.config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    return r"is quantized \(gptq\)"


def quantized_weights(bad: Bad) -> str:
    bad.weights(lambda t: t.update({key: value.to(torch.int8) for key, value in t.items()}))
    return "stored as I8"


def no_decoder(bad: Bad) -> str:
    from transformers import T5Config

    T5Config(d_model=32, num_layers=1, vocab_size=257).save_pretrained(bad.model)
    return "is no causal language model"


def no_tokenizer(bad: Bad) -> str:
    for path in bad.model.glob("tokenizer*"):
        path.unlink()
    return r"model has no tokenizer: copy tokenizer\.json .* into it$"


def half_a_tokenizer(bad: Bad) -> str:
    (bad.model / "tokenizer.json").unlink()
    return r"model has no tokenizer: copy tokenizer\.json"


def broken_tokenizer(bad: Bad) -> str:
    (bad.model / "tokenizer.json").write_text("{")
    return "tokenizer"


def other_shapes(bad: Bad) -> str:
    bad.config(intermediate_size=96)
    return r"layers\.0\.mlp\.down_proj\.weight and 2 alike, .* have another shape than config\.json"


def other_vocabulary(bad: Bad) -> str:
    bad.config(vocab_size=300)
    return r"lm_head\.weight, model\.embed_tokens\.weight have another shape than config\.json says"


EARLY: list[Spoil] = [
    no_model,
    a_file,
    empty_directory,
    broken_config,
    empty_config,
    unknown_type,
    no_weights,
    other_format,
    truncated,
    truncated_header,
    empty_file,
    missing_shard,
    cut_index,
    index_without_map,
    index_of_another_kind,
    index_with_a_tensor_too_many,
    quantized,
    quantized_weights,
    no_decoder,
    no_tokenizer,
    half_a_tokenizer,
    broken_tokenizer,
]


@pytest.mark.parametrize("spoil", EARLY, ids=lambda spoil: spoil.__name__)
def test_bad_models(bad: Bad, spoil: Spoil):
    message = spoil(bad)
    assert re.search(message, refused_untouched(bad))


@pytest.mark.parametrize("name", ["nobody/nothing", "/nowhere/at/all", "./nothing", "nothing"])
def test_models_that_are_nowhere(text: Path, tmp_path: Path, name: str):
    process = run("prune", name, "--out", "out", *quick(text), cwd=tmp_path)
    assert name in refused(process)
    assert {path.name for path in tmp_path.iterdir()} == {"stdout-0", "stderr-0"}


# What shows only when the weights are read: OUT.partial may be there by then, OUT may not.


def nan(bad: Bad) -> str:
    bad.weights(lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(float("nan")))
    return r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values that are NaN or Inf"


def infinity(bad: Bad) -> str:
    bad.weights(lambda t: t["model.layers.0.input_layernorm.weight"][:2].fill_(-float("inf")))
    return r"model\.layers\.0\.input_layernorm\.weight has 2 values that are NaN or Inf"


def nan_in_the_embedding(bad: Bad) -> str:
    bad.weights(lambda t: t["model.embed_tokens.weight"][70].fill_(float("nan")))
    return r"model\.embed_tokens\.weight has 64 values that are NaN or Inf"


def nan_in_the_head(bad: Bad) -> str:
    bad.weights(lambda t: t["lm_head.weight"][0, 0].fill_(float("nan")))
    return r"lm_head\.weight has 1 values that are NaN or Inf"


def overflow(bad: Bad) -> str:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("up_proj", "down_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30

    bad.weights(enlarge)
    return r"output of model\.layers\.1 has \d+ values that are NaN or Inf"


def missing_weight(bad: Bad) -> str:
    bad.weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    return r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"


def missing_embedding(bad: Bad) -> str:
    bad.weights(lambda t: t.pop("model.embed_tokens.weight"))
    return r"lacks the weight model\.embed_tokens\.weight"


LATE: list[Spoil] = [
    nan,
    infinity,
    nan_in_the_embedding,
    nan_in_the_head,
    overflow,
    missing_weight,
    missing_embedding,
    other_shapes,
    other_vocabulary,
]


@pytest.mark.parametrize("spoil", LATE, ids=lambda spoil: spoil.__name__)
def test_bad_weights(bad: Bad, spoil: Spoil):
    message = spoil(bad)
    process = bad.run()
    assert process.returncode == 2, process.errors
    assert process.output == ""
    *progress, line = process.errors.splitlines()
    assert all(re.match(r"block \d/3  ", before) for before in progress), process.errors
    assert line.startswith("besa prune: ")
    assert re.search(message, line)
    assert not (bad.directory / "out").exists()


# The output's place.


def test_out_is_not_empty(bad: Bad):
    (bad.directory / "out").mkdir()
    (bad.directory / "out/mine.txt").write_text("")
    line = refused_untouched(bad)
    assert "out is not empty" in line
    assert "--overwrite" in line


def test_out_is_a_file(bad: Bad):
    (bad.directory / "out").write_text("")
    assert "out is a file" in refused_untouched(bad)
    assert "out is a file" in refused(bad.run("--overwrite"))


def test_out_is_the_model(bad: Bad):
    assert "model is not empty" in refused_untouched(bad, "--out", "model")


def test_out_is_the_model_and_may_be_overwritten(bad: Bad):
    before = stored(bad.model)
    process = bad.run("--out", "model", "--overwrite")
    assert process.returncode == 0, process.errors
    after = stored(bad.model)
    assert after.keys() == before.keys()
    assert same_bytes(after["lm_head.weight"], before["lm_head.weight"])
    assert float((after["model.layers.0.mlp.up_proj.weight"] == 0).float().mean()) == 0.5


def test_out_below_a_file(bad: Bad):
    (bad.directory / "file").write_text("")
    assert "cannot write to" in refused_untouched(bad, "--out", "file/out")


def test_out_below_a_folder_that_may_not_be_written(bad: Bad):
    locked = bad.directory / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("root writes everywhere")
    assert "cannot write to" in refused_untouched(bad, "--out", "locked/out")


def test_out_is_here(bad: Bad):
    here = bad.directory / "here"
    here.mkdir()
    process = run("prune", bad.model, "--out", ".", *quick(bad.text), cwd=here)
    assert "--out" in refused(process)
