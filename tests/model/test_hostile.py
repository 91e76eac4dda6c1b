"""Models that someone made to do harm: refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from besa.errors import BesaError, printable
from besa.formats import PackedConfig
from besa.model.architecture import read_config
from besa.model.checkpoint import Checkpoint
from besa.model.companions import copy_companions
from besa.model.files import model_directory, weight_files
from besa.model.json_files import LARGEST, read_object
from besa.model.quantization import stored_as
from besa.model.record import read_record
from besa.serve.launch import packing_of
from tests.helpers import everything, run

FILE = "model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def index(model: Path, weight_map: object) -> None:
    (model / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -------------------------------------------------------------------------------- the index


@pytest.mark.parametrize(
    "file",
    [
        *("../outside.safetensors", "a/../../outside.safetensors", "/etc/passwd", "", "."),
        *("pytorch_model.bin", "a\0.safetensors", 7, None, ["a"], {}, "/a/b.safetensors"),
    ],
)
def test_an_index_names_files_of_the_model_alone(model: Path, file: object):
    shutil.copy(model / FILE, model.parent / "outside.safetensors")
    index(model, {"lm_head.weight": file})
    with pytest.raises(BesaError, match="which is no safetensors file of the model"):
        weight_files(model)


@pytest.mark.parametrize("weight_map", [None, [], "x", 3, ["lm_head.weight"]])
def test_an_index_of_another_form(model: Path, weight_map: object):
    index(model, weight_map)
    with pytest.raises(BesaError, match=r"index\.json is damaged \(it has no weight_map\)"):
        weight_files(model)


def test_a_file_in_a_folder_of_the_model_is_one(model: Path):
    (model / "parts").mkdir()
    (model / FILE).rename(model / "parts" / FILE)
    names = read_names(model / "parts" / FILE)
    index(model, dict.fromkeys(names, f"parts/{FILE}"))
    assert set(weight_files(model).values()) == {model / "parts" / FILE}


def read_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return list(file.keys())


# --------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", [FILE, "config.json", "tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("target", ["outside", "/dev/zero", "/nowhere"])
def test_links_out_of_a_model_are_refused(model: Path, name: str, target: str):
    (model.parent / "outside").write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(model.parent / target)
    with pytest.raises(BesaError, match=f"{name} is a link out of the model, to "):
        model_directory(model)


def test_a_link_deep_in_a_model_is_not_copied(model: Path, tmp_path: Path):
    (model / "more").mkdir()
    (model / "more/notes.txt").symlink_to("/etc/passwd")
    (tmp_path / "out").mkdir()
    with pytest.raises(BesaError, match=r"notes\.txt is a link out of the model"):
        copy_companions(model, frozenset(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("notes.txt"))


def test_the_hubs_cache_is_links_and_goes_on_working(tiny_model: Path, tmp_path: Path):
    cache = tmp_path / "models--nobody--tiny"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(tiny_model, cache / "blobs")
    snapshot.mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Checkpoint.open(snapshot).block_keys[0]
    (tmp_path / "mine").symlink_to(snapshot)  # and a link to all of it
    assert model_directory(tmp_path / "mine") == tmp_path / "mine"
    (snapshot / "vocab.txt").symlink_to("../../../outside")
    with pytest.raises(BesaError, match=r"vocab\.txt is a link out of the model"):
        model_directory(snapshot)


def test_a_pipe_in_a_model_is_not_waited_for(model: Path):
    (model / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(model / "generation_config.json")
    with pytest.raises(BesaError, match=r"generation_config\.json is no file, but a pipe"):
        model_directory(model)


# ---------------------------------------------------------------------------------- JSON

TEXTS: dict[str, tuple[bytes, str]] = {
    "deep list": (b"[" * 200_000, "it is nested too deeply"),
    "deep object": (b'{"a":' * 200_000, "it is nested too deeply"),
    "list": (b"[]", "it is no JSON object"),
    "null": (b"null", "it is no JSON object"),
    "cut": (b'{"a": ', "is damaged"),
    "not UTF-8": (b'{"a": "\xe9"}', "it is not UTF-8"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "is damaged"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_is_no_object(name: str, model: Path):
    text, words = TEXTS[name]
    for file in ("config.json", f"{FILE}.index.json"):
        (model / file).write_bytes(text)
        with pytest.raises(BesaError, match=words) as caught:
            read_object(model / file)
        assert "\n" not in str(caught.value)
    for read in (weight_files, read_config, packing_of):
        with pytest.raises(BesaError, match=words):
            read(model)
    (model / "besa.json").write_bytes(text)
    assert read_record(model) is None


def test_json_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, LARGEST + 1)  # takes no room
    with pytest.raises(BesaError, match="has 67 MB, which is no description of a model"):
        read_object(path)


@pytest.mark.parametrize("count", ["num_hidden_layers", "n_layer", "num_experts"])
def test_absurd_counts_are_refused_before_anything_is_made(model: Path, count: str):
    config(model, text_config={count: 10**9})
    with pytest.raises(BesaError, match=f"{count} = 1,000,000,000, and no model has above"):
        read_config(model)


def test_more_layers_than_tensors(model: Path):
    config(model, num_hidden_layers=9_999)
    with pytest.raises(BesaError, match="9,999 layers, but the files have 30 tensors"):
        Checkpoint.open(model)


@pytest.mark.parametrize("note", ["x", 3, [1], True])
def test_notes_of_quantization_that_are_none(model: Path, note: object):
    for name in ("quantization_config", "sparsity_config"):
        with pytest.raises(BesaError, match=f"the {name} of config.json is no JSON object"):
            stored_as({name: note})
    config(model, quantization_config=note)
    with pytest.raises(BesaError, match="quantization_config is no object"):
        packing_of(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ignore": 3}, "ignore of quantization_config is no list of names"),
        ({"ignore": [1]}, "ignore of quantization_config is no list of names"),
        ({"group_size": 32.0}, "group_size 32.0 is none of"),
        ({"group_size": [32]}, r"group_size \[32\] is none of"),
        ({"values": ["int8"]}, r"values \['int8'\] is none of"),
        ({"format_version": True}, "version True"),
        ({"format_version": 1.0}, "version 1.0"),
    ],
)
def test_a_packing_that_cannot_be(changes: dict[str, object], words: str):
    with pytest.raises(BesaError, match=words):
        PackedConfig.from_dict({**PackedConfig("int8").to_dict(), **changes})


# --------------------------------------------------------------------------------- names


def test_names_are_printed_as_one_line():
    assert printable("a\nb\x1b[2J\u202e\ud800") == "a\\nb\\x1b[2J\\u202e\\ud800"
    assert printable("Größe, 模型") == "Größe, 模型"


NAMES = ["a b; touch x", "$(touch x)'\"", "-模型", "line\nbreak\x1b[31mred"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_directories_are_names(name: str, tiny_model: Path, tmp_path: Path):
    """They are read, and quoted in what a user may paste into a shell."""
    directory = tmp_path / name
    directory.symlink_to(tiny_model)
    process = run("doctor", f"./{name}", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    directory.unlink()
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    before = everything(directory)
    process = run("doctor", f"./{name}", cwd=tmp_path)
    assert process.returncode == 2
    (line,) = process.errors.splitlines()
    assert "has no safetensors weights: write them with python -c" in line
    assert line.isprintable()
    assert everything(directory) == before
    assert not (tmp_path / "x").exists()


def test_bytes_that_are_no_text_in_a_name(tiny_model: Path, tmp_path: Path):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(tiny_model, directory)
    for arguments in (("doctor", directory), ("export", tiny_model, "--out", directory)):
        process = run(*arguments, cwd=tmp_path)
        assert process.returncode == 2
        (line,) = process.errors.splitlines()
        assert line.endswith("caf\\udce9 has a name that is not UTF-8: rename it")
