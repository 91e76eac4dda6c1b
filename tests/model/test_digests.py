"""Digests tell what nothing else can: that a number became another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.model.digests import check_digests
from tests.export.sparse import pruned_model
from tests.helpers import run


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    pruned = pruned_model("llama", directory / "pruned", tiny_model)
    return export(pruned, ExportConfig(out=directory / "sparse")).out


@pytest.fixture
def sparse(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "sparse"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_every_file_that_a_model_is_read_from_has_one(sparse: Path):
    record = json.loads((sparse / "besa.json").read_text())
    named = {*record["digests"], *record["companion_digests"]}
    assert named == {path.name for path in sparse.iterdir()} - {"besa.json", "README.md"}
    assert check_digests(sparse) == len(named) == 8


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "config.json", "tokenizer.json"]
)
def test_a_bit_is_told_by_doctor_and_before_serving(name: str, sparse: Path, tmp_path: Path):
    process = run("doctor", "sparse", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    lines = process.output.splitlines()
    assert "sparse is whole: 3 files of weights" in lines[0]
    assert "14 packed weights that fit their bitmasks" in lines[0]
    assert lines[1] == "8 files are, to the last bit, what besa wrote"
    path = sparse / name
    if path.suffix == ".json":  # another number in what is still JSON
        path.write_text(path.read_text().replace("64", "65"))
    else:
        flip(path)
    process = run("serve", "sparse", "--verify", "--engine", "transformers", cwd=tmp_path)
    assert process.returncode == 2
    (line,) = process.errors.splitlines()
    assert f"sparse/{name} is not what besa wrote there" in line


def test_what_cannot_be_verified(sparse: Path, tiny_model: Path):
    with pytest.raises(BesaError, match=r"cannot be verified: it has no besa\.json"):
        check_digests(tiny_model)
    record = json.loads((sparse / "besa.json").read_text())
    for digests in ({}, [], 3, None):
        record |= {"digests": digests, "companion_digests": digests}
        (sparse / "besa.json").write_text(json.dumps(record))
        with pytest.raises(BesaError, match=r"its besa\.json has no digests"):
            check_digests(sparse)
    for name in ("../outside", "gone.json"):
        (sparse / "besa.json").write_text(json.dumps({"digests": {name: "0" * 64}}))
        with pytest.raises(BesaError, match=f"{name} is missing, which besa wrote"):
            check_digests(sparse)
