"""The border to the native library: a library of another version is refused, and torch serves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from besa.kernels import abi, native
from tests.helpers import REPOSITORY

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")

# A library with the functions named, and with what it says of itself.
SOURCE = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const char* besa_abi() {{ return "{description}"; }}
{functions}
"""

PRODUCT = """
import torch
from besa.formats import pack
from besa.kernels import sparse_linear
weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
print(sparse_linear(torch.ones(1, 3), pack(weight)).tolist())
"""


def build(folder: Path, source: str) -> Path:
    (folder / "other.cpp").write_text(source)
    library = folder / "libother.so"
    options = ["-shared", "-fPIC", "-o", str(library)]
    subprocess.run(["g++", str(folder / "other.cpp"), *options], check=True)
    return library


def with_functions(description: str) -> str:
    names = [name for name in abi.FUNCTIONS if name != "besa_abi"]
    functions = "\n".join(f"EXPORT int {name}() {{ return 99; }}" for name in names)
    return SOURCE.format(description=description, functions=functions)


def load(monkeypatch: pytest.MonkeyPatch, path: Path) -> object:
    monkeypatch.setenv("BESA_KERNELS", str(path))
    return native.load()


@pytest.mark.skipif(native.library() is None, reason="no native kernels here")
def test_the_library_says_of_itself_what_python_expects():
    library = native.library()
    assert library is not None
    assert library.besa_abi().decode() == abi.DESCRIPTION


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('extern "C" int besa_isas() { return 0; }', "without besa_abi"),
        (SOURCE.format(description=abi.DESCRIPTION, functions=""), "without besa_isas"),
        (with_functions("version 0"), r"\(version 0; needed: version \d+, job of"),
        (with_functions(abi.DESCRIPTION.replace("job of", "job of 1")), "needed: version"),
    ],
    ids=["an old one", "a function too few", "another version", "another job"],
)
def test_a_library_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
):
    found = load(monkeypatch, build(tmp_path, source))
    assert isinstance(found, str)
    assert "\n" not in found
    assert "another version of besa" in found
    assert re.search(reason, found)


@needs_compiler
def test_then_torch_serves_with_one_line(tmp_path: Path):
    library = build(tmp_path, with_functions("version 0"))
    process = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        env={**os.environ, "BESA_KERNELS": str(library), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "[[2.0, 1.0]]\n"
    assert process.stderr.count("no native kernels, torch serves instead, slower: ") == 1
    assert "another version of besa (version 0; needed: " in process.stderr


@needs_compiler
def test_structures_have_the_same_fields_in_cpp(tmp_path: Path):
    """Their order and places; the library itself tells only the size of all."""
    fields = [
        (structure.__name__, name, getattr(structure, name).offset)
        for structure in (abi.Job, abi.Experts)
        for name, _ in structure._fields_
    ]
    places = "\n".join(
        f'std::printf("{structure} {name} %zu\\n", offsetof(besa::{structure}, {name}));'
        for structure, name, _ in fields
    )
    source = tmp_path / "fields.cpp"
    source.write_text(
        f"#include <cstddef>\n#include <cstdio>\n#include <abi.h>\nint main() {{ {places} }}"
    )
    program, headers = tmp_path / "fields", REPOSITORY / "besa" / "kernels"
    subprocess.run(["g++", "-std=c++17", f"-I{headers}", str(source), "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [" ".join(map(str, field)) for field in fields]
