"""What MkDocs needs beside docs/: the pages of the root, their pictures, and the Python reference.

MkDocs calls these functions by their names; mkdocs.yml names this file.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from besa.settings import explanation

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    **{name: name for name in ("CONTRIBUTING.md", "LOG.md", "CHANGELOG.md", "SECURITY.md")},
}
# The heading of each part of the reference, and what it holds.
REFERENCE = {
    "Prune": ("besa.prune", "besa.PruneConfig", "besa.PruneResult"),
    "Recover": ("besa.recover", "besa.RecoverConfig", "besa.KeepZeros"),
    "Export": (
        "besa.export.export",
        "besa.export.ExportConfig",
        "besa.export.ExportResult",
        "besa.export.ort_library",
    ),
    "Load": ("besa.BesaConfig",),
    "Packed weights": ("besa.formats", "besa.kernels"),
    "Errors": ("besa.BesaError",),
}


def on_startup(**_: Any) -> None:
    """Lays besa out as it is installed, for the reference: a copy of its sources.

    First of all, since mkdocstrings leaves out those of its paths that are not there yet.
    """
    besa = ROOT / "build" / "site-sources" / "besa"
    shutil.rmtree(besa, ignore_errors=True)
    for source, inside in (("besa", ""), ("export", "export"), ("serve", "serve")):
        for path in (ROOT / source).rglob("*.py"):
            copy = besa / inside / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def on_files(files: Files, config: Any) -> Files:
    """Adds the root's pages, the pictures that they show, and the reference."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    for picture in (ROOT / "benchmarks" / "results").glob("*.svg"):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are in the repository, made those of the site."""
    markdown = re.sub(r"\]\((?:\.\./)?README\.md", "](index.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)
    markdown = markdown.replace('src="../benchmarks/', 'src="benchmarks/')
    return markdown.replace("[benchmarks/results](benchmarks/results)", "benchmarks/results")


def reference() -> str:
    """The page of the Python functions; mkdocstrings fills in what their docstrings say."""
    parts = ["# Python", "", "What `import besa` gives, and the packages beside it.", ""]
    for heading, names in REFERENCE.items():
        parts += [f"## {heading}", ""]
        for name in names:
            parts += [f"::: {name}", "", *settings_of(name), ""]
    return "\n".join(parts)


def settings_of(name: str) -> list[str]:
    """A table of a class's settings, if it has any: the command line's flags are made of them."""
    module, _, attribute = name.rpartition(".")
    kind = getattr(import_module(module), attribute)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return []
    rows = []
    for each in fields(kind):
        if "flag" in each.metadata:
            name, values = each.name, str(each.type).replace(" | ", " or ")
            rows.append(f"| `{name}` | {values} | {escaped(explanation(each))} |")
    return ["| Setting | Type | |", "| --- | --- | --- |", *rows] if rows else []


def escaped(words: str) -> str:
    """Words in a table."""
    return words.replace("|", "\\|").replace("*", "\\*")
