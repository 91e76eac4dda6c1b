"""Damage to one file of a model, drawn from a seed: by a disk, a download, or someone's intent."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import onnx

# What someone may put in the place of a JSON value.
_HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1.5, 2**31, 2**63, -(2**63), 10**30, 1e308, "", "x", "x" * 100_000),
    *("../../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\u202e", "$(x)", "`x`", "float64"),
    *([], {}, [1], ["a", None], {"a": {"b": []}}, [[]], "bfloat16", "int4", 3, 64, 1e-300),
]


@dataclass(frozen=True)
class Damage:
    """What was done to a file.

    Attributes:
        numbers: whether it may have made one number of another, which digests alone can tell. All
            else has to be noticed where the model is loaded, or to change nothing.
    """

    file: str
    kind: str
    numbers: bool = False


Change = Callable[[Path, Random], Damage]


def damage(directory: Path, chance: Random) -> Damage:
    """Damages one file of a directory, in place."""
    files = sorted(path for path in directory.iterdir() if path.suffix in _CHANGES)
    suffix = chance.choice(sorted({path.suffix for path in files}))
    path = chance.choice([path for path in files if path.suffix == suffix])
    return chance.choice([*_CHANGES[suffix], *_ANY])(path, chance)


# ------------------------------------------------------------------------- of any file


def _cut(path: Path, chance: Random) -> Damage:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])
    return Damage(path.name, "cut off")


def _longer(path: Path, chance: Random) -> Damage:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 64)))
    return Damage(path.name, "longer", path.suffix == ".onnx")


def _elsewhere(path: Path, chance: Random) -> Damage:
    path.unlink()
    path.symlink_to(chance.choice(["/etc/passwd", "/dev/zero", "../outside", path.name]))
    return Damage(path.name, "a link")


def _gone(path: Path, chance: Random) -> Damage:
    path.unlink()
    if chance.random() < 0.5:
        path.mkdir()
    return Damage(path.name, "gone")


_ANY: list[Change] = [_cut, _longer, _elsewhere, _gone]


def _flip(path: Path, chance: Random, start: int, end: int) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


# ------------------------------------------------------------------------------- JSON


def _json_byte(path: Path, chance: Random) -> Damage:
    _flip(path, chance, 0, path.stat().st_size)
    return Damage(path.name, "a bit of JSON", numbers=True)


def _json_value(path: Path, chance: Random) -> Damage:
    """Another value at any depth, or none."""
    found = json.loads(path.read_text())
    places = list(_places(found))
    holder, key = chance.choice(places)
    if isinstance(holder, dict) and chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(_HOSTILE)
    path.write_text(json.dumps(found))
    return Damage(path.name, f"JSON, {str(key)[:40]}", numbers=True)


def _places(found: Any) -> Any:
    for key, value in list(found.items() if isinstance(found, dict) else enumerate(found)):
        yield found, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _json_other(path: Path, chance: Random) -> Damage:
    """What is no JSON object of this kind, or far too much of one."""
    texts = [b"", b"[]", b"3", b'"x"', b"null", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000]
    path.write_bytes(chance.choice(texts))
    return Damage(path.name, "other JSON")


# ------------------------------------------------------------------------ safetensors


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(path: Path, header: Any, rest: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def _header_byte(path: Path, chance: Random) -> Damage:
    _flip(path, chance, 8, path.stat().st_size - len(_header(path)[1]))
    return Damage(path.name, "a bit of the header")


def _header_length(path: Path, chance: Random) -> Damage:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    other = chance.choice([0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", other) + data[8:])
    return Damage(path.name, "the header's length")


def _header_entry(path: Path, chance: Random) -> Damage:
    """Another shape, type, place or name of a tensor."""
    header, rest = _header(path)
    name = chance.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    kind = chance.choice(["shape", "dtype", "data_offsets", "name"])
    if kind == "shape":
        shape = entry["shape"]
        shapes = [shape[::-1], [*shape, 1], shape[:-1], [2**62, 4], [-1, 4], [0], 7, None, ["a"]]
        entry["shape"] = chance.choice(shapes)
    elif kind == "dtype":
        kinds = ["F64", "F32", "F16", "BF16", "I32", "U32", "I8", "U8", "BOOL", "F8_E4M3", "Q", 3]
        entry["dtype"] = chance.choice(kinds)
    elif kind == "data_offsets":
        start, end = entry["data_offsets"]
        offsets = [[start - 4, end], [start, end + 4], [start + 4, end + 4], [end, start], [-8, 0]]
        entry["data_offsets"] = chance.choice([*offsets, [0, 2**64], "ab", [start], None])
    else:
        names = ["", "x", "x" * 100_000, f"{name}.", name.replace("0", "00"), f"a\n\x1b[2J{name}"]
        names += [name.replace("layers.", "layers.99"), name.replace("weight", "w\u00e9ight")]
        header[chance.choice(names)] = header.pop(name)
    _with_header(path, header, rest)
    return Damage(path.name, f"another {kind} in the header")


def _tensors(path: Path, ending: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """The tensors with such names, and where in the file they are."""
    header, rest = _header(path)
    begin = path.stat().st_size - len(rest)
    return [
        (name, begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for name, entry in sorted(header.items())
        if name.endswith(ending) and entry["data_offsets"][0] < entry["data_offsets"][1]
    ]


def _structure_byte(path: Path, chance: Random) -> Damage:
    """A bit of a bitmask, or of the rows' numbers."""
    found = _tensors(path, ("_bitmask", "_rows"))
    if not found:
        return _tensor_byte(path, chance)
    name, start, end = chance.choice(found)
    _flip(path, chance, start, end)
    return Damage(path.name, f"a bit of {name.rpartition('_')[2]}")


def _tensor_byte(path: Path, chance: Random) -> Damage:
    """A bit of what is no bitmask."""
    endings = ("_values", "_scale", "_steps", "weight")
    name, start, end = chance.choice(_tensors(path, endings))
    _flip(path, chance, start, end)
    return Damage(path.name, f"a bit of {name.rpartition('_')[2]}", numbers=True)


def _exchanged(path: Path, chance: Random) -> Damage:
    """Two tensors under each other's names."""
    header, rest = _header(path)
    one, other = chance.sample(sorted(header.keys() - {"__metadata__"}), 2)
    header[one], header[other] = header[other], header[one]
    _with_header(path, header, rest)
    alike = all(header[one][key] == header[other][key] for key in ("shape", "dtype"))
    return Damage(path.name, "two tensors exchanged", numbers=alike)


# ------------------------------------------------------------------------------- ONNX


def _graph_byte(path: Path, chance: Random) -> Damage:
    _flip(path, chance, 0, path.stat().st_size)
    return Damage(path.name, "a bit of the graph", numbers=True)


def _external(path: Path, chance: Random) -> Damage:
    """Where an initializer's data are said to be."""
    model = onnx.load(path, load_external_data=False)
    entry = chance.choice(chance.choice(model.graph.initializer).external_data)
    places = ["../x", "/etc/passwd", "", "..", "a\nb", "nowhere", "model.onnx"]
    numbers = ["-1", "0", "1", str(2**62), str(2**64), "x", "1e3", ""]
    entry.value = chance.choice(places if entry.key == "location" else numbers)
    path.write_bytes(model.SerializeToString())
    return Damage(path.name, f"another {entry.key} of data", numbers=True)


def _initializer(path: Path, chance: Random) -> Damage:
    """Another shape or type of an initializer, or attribute of the product."""
    model = onnx.load(path, load_external_data=False)
    tensor = chance.choice(model.graph.initializer)
    kind = chance.choice(["shape", "type", "attribute"])
    if kind == "shape":
        at = chance.randrange(len(tensor.dims))
        tensor.dims[at] = chance.choice([0, -1, 1, tensor.dims[at] + 1, 2**40, 2**62])
    elif kind == "type":
        tensor.data_type = chance.choice([0, 1, 2, 3, 6, 7, 10, 16, 99])
    else:
        (product,) = (node for node in model.graph.node if node.op_type == "SparseMatMul")
        attribute = chance.choice(product.attribute)
        attribute.i = chance.choice([-1, 0, 1, 7, 32, 64, 2**40, 2**62])
    path.write_bytes(model.SerializeToString())
    return Damage(path.name, f"another {kind}", numbers=kind == "attribute")


def _data_byte(path: Path, chance: Random) -> Damage:
    _flip(path, chance, 0, path.stat().st_size)
    return Damage(path.name, "a bit of data", numbers=True)


_CHANGES: dict[str, list[Change]] = {
    ".json": [_json_byte, _json_value, _json_value, _json_value, _json_other],
    ".safetensors": [
        *(_header_byte, _header_byte, _header_length, _header_entry, _header_entry),
        *(_structure_byte, _structure_byte, _tensor_byte, _exchanged),
    ],
    ".onnx": [_graph_byte, _graph_byte, _external, _external, _initializer, _initializer],
    ".data": [_data_byte, _data_byte],
}
