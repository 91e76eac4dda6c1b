"""The rooms of the package and the floors that they stand on: no import points upwards.

Imports are read from the sources, those inside functions, too. `besa.export` and `besa.serve` are
the folders `export/` and `serve/`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"besa": ROOT / "besa", "besa.export": ROOT / "export", "besa.serve": ROOT / "serve"}

# From the ground up. A room may import from its own floor and from those below.
FLOORS = (
    {
        *(
            "errors",
            "machine",
            "methods",
            "processes",
            "progress",
            "settings",
            "telemetry",
            "typed_json",
        ),
        *("version", "writing"),
    },
    {"kernels"},
    {"formats", "model", "data", "report"},
    {"evaluation", "doctor"},
    {"pruning", "recovery", "rotation", "export", "serve", "bench"},
    {"demo", "planning"},
    {"cli"},
    {"besa", "registration", "__main__"},  # the facade: what `import besa` gives
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

Arrow = tuple[str, str]


def modules() -> dict[str, Path]:
    """All modules of the package, by their names."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(source: str, known: Iterable[str]) -> Iterator[str]:
    """The modules of the package that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "besa")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "besa":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield submodule if submodule in known else node.module


def room(module: str) -> str:
    """The room of a module: `pruning` for `besa.pruning.nm`."""
    return "besa" if module == "besa" else module.split(".")[1]


def arrows() -> list[Arrow]:
    """Each import of one module by another, across rooms."""
    known = modules()
    return [
        (module, target)
        for module, path in known.items()
        for target in imports(path.read_text(encoding="utf-8"), known)
        if room(module) != room(target)
    ]


def upwards(found: Iterable[Arrow]) -> list[str]:
    return [
        f"{module} imports {target}, a floor above it"
        for module, target in found
        if FLOOR[room(target)] > FLOOR[room(module)]
    ]


def circle(found: Iterable[Arrow]) -> list[str]:
    """Rooms that need each other, in the order in which they do; empty if there are none."""
    needs: dict[str, set[str]] = {}
    for module, target in found:
        needs.setdefault(room(module), set()).add(room(target))

    def walk(way: list[str]) -> list[str]:
        for target in sorted(needs.get(way[-1], ())):
            if target in way:
                return [*way[way.index(target) :], target]
            if closed := walk([*way, target]):
                return closed
        return []

    return next((closed for start in sorted(needs) if (closed := walk([start]))), [])


def test_every_room_has_a_floor():
    assert {room(module) for module in modules()} == set(FLOOR)


def test_no_import_points_upwards():
    assert upwards(arrows()) == []


def test_rooms_form_no_circle():
    assert circle(arrows()) == []


def test_an_arrow_upwards_is_named():
    assert upwards([("besa.kernels.linear", "besa.cli.prune")]) == [
        "besa.kernels.linear imports besa.cli.prune, a floor above it"
    ]


def test_a_circle_is_named():
    found = [("besa.serve.a", "besa.bench.b"), ("besa.bench.c", "besa.serve.d")]
    assert circle(found) == ["bench", "serve", "bench"]


@pytest.mark.parametrize(
    "source",
    [
        "import besa.model.files",
        "from besa.model.files import resolve",
        "from besa.model import files",
        "def late():\n    from besa.model import files",
    ],
)
def test_every_way_to_import_is_read(source: str):
    assert list(imports(source, {"besa.model", "besa.model.files"})) == ["besa.model.files"]


@pytest.mark.parametrize("engine", ["transformers", "vllm", "onnxruntime", "onnxruntime_genai"])
def test_kernels_and_formats_know_no_engine(engine: str):
    for module, path in modules().items():
        if room(module) in ("kernels", "formats"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = [
                alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
            ]
            names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
            assert engine not in {name.split(".")[0] for name in names}, module
