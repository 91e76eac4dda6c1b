"""Every example in a docstring is right: Python runs as doctests, `besa …` parses.

An example is complete by itself, with the names of its own module. It runs in a directory of its
own. There it finds what users have: a tiny Llama as `path/to/model`, `path/to/pruned`,
`path/to/sparse` and `path/to/onnx`, a tiny Qwen3-MoE with zeros as `path/to/mixture` and
`path/to/sparse-mixture`, what `besa demo` compared as `path/to/comparison.json`, and what
`besa bench` measured as `path/to/results.json`. What it writes, it writes beside `path`: `pruned`,
`sparse`.
"""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from besa.cli import COMMANDS, build_parser
from besa.cli.plan_flag import with_out
from besa.evaluation.config import EvalConfig
from besa.export.config import ExportConfig
from besa.pruning.config import PruneConfig
from besa.recovery.config import RecoverConfig
from besa.settings import given
from tests.export.sparse import pruned_model
from tests.test_floors import modules

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}

RESULTS = Path(__file__).parents[1] / "benchmarks/results"

# They measure, trace or start an engine, and that takes seconds.
SLOW = {
    "besa.bench.quality",
    "besa.demo.compare",
    "besa.doctor.examine",
    "besa.doctor.speed",
    "besa.export.onnx.standard",
    "besa.serve.process",
}

CODE = (ast.Call, ast.Assign, ast.Import, ast.ImportFrom, ast.With, ast.Subscript)
COMMAND = re.compile(rf"^ *(besa (?:{'|'.join(COMMANDS)}) .*)$", re.MULTILINE)
SETTINGS: dict[str, Any] = {
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "export": ExportConfig,
    "eval": EvalConfig,
}


def docstrings(source: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (found := ast.get_docstring(node)):
            yield found


def code(docstring: str) -> Iterator[str]:
    """The paragraphs that are Python, yet no doctest."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        try:
            tree = ast.parse(dedent(paragraph))
        except SyntaxError:
            continue
        if any(isinstance(node, CODE) for node in ast.walk(tree)):
            yield paragraph


def commands() -> list[str]:
    """The command lines of `besa` in all docstrings."""
    return sorted(
        {
            found[1]
            for source in SOURCES.values()
            for docstring in docstrings(source)
            for found in COMMAND.finditer(docstring)
        }
    )


@pytest.fixture(scope="session")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `path/to/model` and the others."""
    from besa import prune
    from besa.export import export

    directory = tmp_path_factory.mktemp("examples")
    (directory / "path/to").mkdir(parents=True)
    model, pruned, sparse = (directory / f"path/to/{x}" for x in ("model", "pruned", "sparse"))
    model.symlink_to(tiny_model)
    (directory / "path/to/comparison.json").symlink_to(RESULTS / "table.json")
    (directory / "path/to/results.json").symlink_to(RESULTS / "serving/demo.json")
    prune(model, PruneConfig(out=pruned, method="wanda", samples=4, seqlen=32, device="cpu"))
    export(pruned, ExportConfig(out=sparse))
    mixture = pruned_model("qwen3_moe", directory / "path/to/mixture", tiny_model)
    export(mixture, ExportConfig(out=directory / "path/to/sparse-mixture"))
    return directory


@pytest.fixture(scope="session")
def onnx_model(models: Path) -> None:
    """Makes `path/to/onnx`, a dense graph."""
    from besa.export import export

    out = models / "path/to/onnx"
    export(models / "path/to/pruned", ExportConfig(out=out, format="onnx"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, source in SOURCES.items()
        if ">>> " in source
    ],
)
def test_python_runs(
    name: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if ".onnx" in name:
        request.getfixturevalue("onnx_model")
    (tmp_path / "path").symlink_to(models / "path")
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(import_module(name), optionflags=OPTIONS).failed == 0


@pytest.mark.parametrize("name", SOURCES)
def test_python_is_a_doctest(name: str) -> None:
    assert [found for text in docstrings(SOURCES[name]) for found in code(text)] == []


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    _, *words = shlex.split(command.replace("…", ""), comments=True)
    args, unknown = build_parser().parse_known_args(words)
    assert unknown == [] or args.command == "serve"
    if settings := SETTINGS.get(args.command):
        found = given(settings, args)
        settings(**(with_out(found, args) if "plan" in args else found))
