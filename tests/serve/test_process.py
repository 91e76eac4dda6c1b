"""An engine's process, with small programs in the place of engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import besa.serve.launch
from besa.errors import BesaError
from besa.serve.command import EngineCommand
from besa.serve.launch import serve
from besa.serve.process import EngineError, RunningEngine
from besa.serve.settings import ServeConfig

FAILS = "raise ValueError('too few cores')"
TELLS = (
    "import os; print({name: os.environ.get(name) for name in ('VLLM_API_KEY', 'BESA_API_KEY')})"
)


def command(program: str, key_variable: str = "BESA_API_KEY") -> EngineCommand:
    arguments = (sys.executable, "-c", program)
    return EngineCommand("transformers", "1.0", key_variable, arguments, {})


def test_why_it_did_not_start():
    config = ServeConfig("sparse", port=9)
    with RunningEngine(command(FAILS), config) as engine, pytest.raises(EngineError) as caught:
        engine.wait_until_ready()
    assert (caught.value.engine, caught.value.reason) == ("transformers", "too few cores")
    assert str(caught.value) == "transformers did not start: too few cores"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "import os; print('loads', flush=True); os.abort()",
            "(SIGABRT); the last line of its log: loads",
        ),
        ("raise SystemExit(3)", "(exit code 3); its log is empty"),
    ],
)
def test_what_is_seen_where_the_log_does_not_say_why(program: str, reason: str):
    config = ServeConfig("sparse", port=9)
    with RunningEngine(command(program), config) as engine, pytest.raises(EngineError) as caught:
        engine.wait_until_ready()
    assert caught.value.reason == f"it ended {reason}"


@pytest.mark.parametrize("verbose", [False, True])
def test_where_its_log_is(sparse: Path, monkeypatch: pytest.MonkeyPatch, verbose: bool):
    """Only where it was not shown already."""
    monkeypatch.setattr(besa.serve.launch, "command_for", lambda *_: command(FAILS))
    hint = "" if verbose else r" \(--verbose shows its log\)"
    with pytest.raises(BesaError, match=f"^transformers did not start: too few cores{hint}$"):
        serve(ServeConfig(str(sparse), port=0, verbose=verbose))


def test_the_key_is_in_its_own_variable_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BESA_API_KEY", "mine")
    config = ServeConfig("sparse", port=9, api_key="secret")
    with RunningEngine(command(TELLS, "VLLM_API_KEY"), config) as engine:
        assert engine.wait() == 0
    assert list(engine.log) == ["{'VLLM_API_KEY': 'secret', 'BESA_API_KEY': None}"]
