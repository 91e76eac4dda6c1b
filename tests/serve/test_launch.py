"""What `besa serve` says and checks around an engine; the engine itself is left out here."""

from __future__ import annotations

import json
import shlex
import socket
import warnings
from pathlib import Path

import pytest

import besa.serve.launch
import besa.serve.vllm.engine
from besa.errors import BesaError, BesaWarning
from besa.serve.launch import announcement, free_port, packing_of, serve
from besa.serve.settings import ServeConfig


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the engine: that it would be started is an error."""

    def engine(*_: object) -> None:
        raise BesaError("it would be started now")

    monkeypatch.setattr(besa.serve.launch, "RunningEngine", engine)
    monkeypatch.setattr(besa.serve.vllm.engine, "vllm_version", lambda: "0.32.0+cpu")


def started(config: ServeConfig) -> list[str]:
    """The warnings on the way to the engine."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BesaError, match="now"):
            serve(config)
    return [str(each.message) for each in caught if each.category is BesaWarning]


@pytest.mark.usefixtures("no_engine")
def test_an_open_door_is_worth_a_word(sparse: Path):
    [words] = started(ServeConfig(str(sparse), host="0.0.0.0", port=0))
    assert words.startswith("whoever reaches 0.0.0.0:")
    assert words.endswith(" can use the model: give an --api-key")
    assert not started(ServeConfig(str(sparse), host="0.0.0.0", port=0, api_key="k"))
    assert not started(ServeConfig(str(sparse), port=0))


@pytest.mark.usefixtures("no_engine")
def test_a_vllm_that_besa_does_not_know(sparse: Path, dense: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(besa.serve.vllm.engine, "vllm_version", lambda: "0.99.1")
    [words] = started(ServeConfig(str(sparse), engine="vllm", port=0))
    assert "besa knows vLLM from " in words
    assert "this is 0.99.1: packed models may not load" in words
    assert not started(ServeConfig(str(dense), engine="vllm", port=0))  # nothing to load by besa


@pytest.mark.usefixtures("no_engine")
def test_a_dense_model_is_served_as_it_is(
    sparse: Path, dense: Path, capsys: pytest.CaptureFixture[str]
):
    started(ServeConfig(str(dense), port=0))
    words = f"besa serve: nothing is packed in {dense}: it is served as it is; see `besa export`"
    assert words in capsys.readouterr().err.splitlines()
    started(ServeConfig(str(sparse), port=0))
    assert "nothing is packed" not in capsys.readouterr().err


def test_packing(sparse: Path, dense: Path, tmp_path: Path):
    packing = packing_of(sparse)
    assert packing is not None
    assert packing.values == "bfloat16"
    assert packing_of(dense) is None
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "awq"}})
    )
    assert packing_of(tmp_path) is None


def test_free_ports():
    port = free_port("127.0.0.1", 0)
    assert free_port("127.0.0.1", port) == port
    assert free_port("localhost", 0) > 1023
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(BesaError, match=f"port {port} of 127.0.0.1 is in use"),
    ):
        free_port("127.0.0.1", port)


def test_the_line_to_try_it():
    """Whatever a model is called, a shell takes the line."""
    config = ServeConfig("m", host="::1", port=81, served_model_name='it\'s "mine"', api_key="k")
    where, line = announcement(config).splitlines()
    assert where == 'http://[::1]:81/v1 serves it\'s "mine"'
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://[::1]:81/v1/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == 'it\'s "mine"'
    assert words[-2:] == ["-H", "Authorization: Bearer $BESA_API_KEY"]
    assert "Authorization" not in announcement(ServeConfig("m"))
