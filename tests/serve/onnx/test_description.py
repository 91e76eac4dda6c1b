"""Graphs that someone made to do harm: no file elsewhere is read, no foreign library loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from besa.errors import BesaError

onnx = pytest.importorskip("onnx")

from besa.export.onnx.check import load_whole  # noqa: E402
from besa.export.onnx.runtime import NAME, ort_library  # noqa: E402
from besa.serve.onnx.description import described_by  # noqa: E402

MODEL = {"vocab_size": 3, "context_length": 8, "eos_token_id": 0}


def described(directory: Path, options: Any, **model: Any) -> Path:
    decoder = {"filename": "model.onnx", "session_options": options}
    found = {"model": {**MODEL, "decoder": decoder, **model}}
    (directory / "genai_config.json").write_text(json.dumps(found))
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {"custom_ops_library": "evil"},
        {"custom_ops_library": f"../{NAME}"},
        {"provider_options": [{"qnn": {"backend_path": "evil.so.1"}}]},
        {"provider_options": [{"x": ["evil.DLL"]}]},
    ],
)
def test_a_library_that_is_not_besas_is_not_loaded(options: Any, tmp_path: Path):
    (tmp_path / "m").mkdir()
    for name in ("evil", "evil.so.1", "evil.DLL"):
        (tmp_path / "m" / name).write_bytes(b"\x7fELF")
    (tmp_path / NAME).write_bytes(b"\x7fELF")
    try:
        ort_library()
    except BesaError as error:
        pytest.skip(str(error))
    directory = described(tmp_path / "m", options)
    with pytest.raises(BesaError, match="a library that this besa did not build"):
        described_by(directory)
    assert described_by(directory, trust_remote_code=True)["model"]["vocab_size"] == 3
    described(directory, {"custom_ops_library": NAME})
    shutil.copyfile(ort_library(), directory / NAME)
    described_by(directory)


@pytest.mark.parametrize("model", [{"decoder": 3}, {"decoder": {}}, {"decoder": None}])
def test_a_description_without_its_parts(model: Any, tmp_path: Path):
    with pytest.raises(BesaError, match=r"genai_config\.json is damaged"):
        described_by(described(tmp_path, {}, **model))


def graph(path: Path, within: bool, **where: str) -> Path:
    """A graph with external data, of the graph itself or of a branch within it."""
    tensor = onnx.TensorProto(
        name="w", dims=[2], data_type=1, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner)
    outer = onnx.helper.make_graph([branch], "outer", [], []) if within else inner
    path.write_bytes(onnx.helper.make_model(outer).SerializeToString())
    return path


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"location": "../data"}, "no file beside it"),
        ({"location": "/etc/passwd"}, "no file beside it"),
        ({"location": ""}, "no file beside it"),
        ({}, "no file beside it"),
        ({"location": "link"}, "is a link out of the model"),
        ({"location": "data", "offset": "-1"}, "w lies nowhere"),
        ({"location": "data", "length": "many"}, "w lies nowhere"),
        ({"location": "data", "offset": str(2**62), "length": "8"}, "is cut off: it has 8 bytes"),
        ({"location": "nowhere"}, "nowhere is missing"),
    ],
)
def test_external_data_lie_beside_the_graph(
    where: dict[str, str], words: str, within: bool, tmp_path: Path
):
    (tmp_path / "m").mkdir()
    for path in (tmp_path / "data", tmp_path / "m" / "data"):
        path.write_bytes(bytes(8))
    (tmp_path / "m" / "link").symlink_to("../data")
    path = graph(tmp_path / "m" / "model.onnx", within, **where)
    with pytest.raises(BesaError, match=words) as caught:
        load_whole(path)
    assert "\n" not in str(caught.value)
    assert load_whole(graph(path, within, location="data", length="8"))
