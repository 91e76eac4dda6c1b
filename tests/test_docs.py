"""The pages are true: README.md, CONTRIBUTING.md, docs/; links, files, flags, figures, examples."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import besa
from besa.cli import build_parser
from besa.serve.launch import free_port
from tests.helpers import PATIENCE
from tests.test_floors import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    return [code for name, code in found if name == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's shell blocks, without comments and settings."""
    for code in blocks(page, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """The long flags of a command."""
    return {o for a in parser._actions for o in a.option_strings if o.startswith("--")} - {"--help"}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    actions = build_parser()._actions
    (choices,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@each_page
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    targets += re.findall(r'src="([^"]+)"', prose(page))
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT), target
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@each_page
def test_named_files_are_there(page: Path):
    """A name in backticks that begins with one of our folders is that of a file."""
    folders = r"(?:besa|export|serve|tests|benchmarks|docs|\.ci)"
    for name in re.findall(rf"`({folders}/[^`\s]*)`", page.read_text()):
        if "NAME" not in name:
            assert list(ROOT.glob(name.rstrip("/"))), name


@each_page
def test_shell_examples_are_commands(page: Path):
    known = parsers()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for program, *words in commands(page):
        if program == "make":
            assert set(words) <= set(targets), words
        elif program == "besa":
            _, unknown = known[words[0]].parse_known_args(words[1:])
            assert words[0] == "serve" or not unknown, words


def test_manifests_are_what_kubernetes_takes():
    validate = pytest.importorskip("kubernetes_validate").validate
    started = []
    for code in blocks(ROOT / "docs" / "kubernetes.md", "yaml"):
        for manifest in yaml.safe_load_all(code):
            validate(manifest, "1.31", strict=True)
            if manifest["kind"] != "Service":
                (container,) = manifest["spec"]["template"]["spec"]["containers"]
                started.append([*container["command"], *container["args"]])
    (program, command, *words), ranks = started
    assert program == "besa"
    _, unknown = parsers()[command].parse_known_args(words)
    assert not unknown
    assert subprocess.run(["sh", "-n", "-c", ranks[-1]]).returncode == 0


@each_page
def test_extras_are_there(page: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for names in re.findall(r"'\.\[([\w,]+)\]'", page.read_text()):
        assert set(names.split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("command", ["prune", "recover", "export", "serve", "bench"])
def test_every_flag_is_explained(command: str):
    text = (ROOT / "docs" / f"{command}.md").read_text()
    listed = set(re.findall(r"^\| `(--[\w-]+)", text, flags=re.M))
    assert listed == flags(parsers()[command])


def test_every_flag_of_eval_is_explained():
    named = set(re.findall(r"`(--[\w-]+)", (ROOT / "docs" / "prune.md").read_text()))
    assert flags(parsers()["eval"]) <= named


def test_the_floors_are_drawn():
    """From the top down, without the facade (`import besa`)."""
    (drawing,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    lines = [line.split() for line in drawing.splitlines() if "↓" not in line]
    assert [set(rooms) for rooms in reversed(lines)] == list(FLOORS[:-1])


def test_figures_are_what_the_results_say():
    script = ROOT / "benchmarks" / "readme.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other, as their results are named: a pruned model, a packed one, a graph."""
    from besa.errors import BesaError
    from besa.export import ExportConfig, export, ort_library

    monkeypatch.chdir(tmp_path)
    docs = ROOT / "docs"
    names = ("prune", "recover", "export", "formats")
    for page in (ROOT / "README.md", *(docs / f"{name}.md" for name in names)):
        for code in blocks(page, "python"):
            exec(compile(code, page, "exec"), {})
    in_transformers, in_onnx_runtime = blocks(docs / "engines.md", "python")
    exec(compile(in_transformers, "engines.md", "exec"), {})
    try:
        ort_library()
    except BesaError as error:
        pytest.skip(str(error))
    export("pruned", ExportConfig(out="onnx-sparse", format="onnx", sparse=True))
    exec(compile(in_onnx_runtime, "engines.md", "exec"), {})


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path):
    """In one shell, but for the server, which has a terminal of its own."""
    script = "set -e\n"
    for code in blocks(ROOT / "docs" / "tutorial.md", "sh"):
        if code.startswith("besa serve"):
            script += f"{code.strip()} > serving & server=$!\n"
            script += "until grep -q /v1 serving; do kill -0 $server; sleep 0.1; done\n"
            script += "trap 'kill $server' EXIT\n"
        else:
            script += code
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", script.replace("8765", str(free_port("127.0.0.1", 0)))],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert '"text":"' in done.stdout.replace(" ", "")
    assert "batch 1" in done.stdout
    for name in ("pruned/report.html", "sparse/config.json", "sparse-int8/config.json"):
        assert (tmp_path / name).is_file(), name


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path):
    """From every page, with every link and anchor; and it holds what Python users call."""
    pytest.importorskip("mkdocstrings")
    mkdocs = Path(sys.executable).with_name("mkdocs")
    command = [str(mkdocs), "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert pages >= {"index.html", *(page.with_suffix(".html").name for page in PAGES[1:])}
    reference = (tmp_path / "site" / "reference.html").read_text()
    for name in set(besa.__all__) - {"__version__"}:
        assert f'id="besa.{name}"' in reference, name
    for setting in dataclasses.fields(besa.PruneConfig):
        assert f"<code>{setting.name}</code>" in reference, setting.name
