"""The files of a checkpoint: found, checked, opened lazily, and written.

torch is imported by what needs it: a command that only looks for a model starts without it.

>>> files = weight_files(Path("path/to/model"))
>>> with open_tensors(files, ["model.norm.weight"]) as tensors:
...     write_tensors({"norm": tensors["model.norm.weight"][...]}, Path("norm.safetensors"))
"""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from besa.errors import BesaError, check_name, one_line
from besa.model.companions import WEIGHTS
from besa.model.json_files import read_object
from besa.model.links import check_links
from besa.writing import atomic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# How the names of types begin whose numbers are whole.
WHOLE = ("I", "U", "BOOL")

# Beside an ONNX model, what ONNX Runtime GenAI reads of it.
GENAI_CONFIG = "genai_config.json"


def resolve(model: str | Path) -> Path:
    """The directory of a model: as given, or fetched from the hub by its id when online.

    Raises:
        BesaError: nothing there, or a directory with a file that is a link out of it, or with a
            name that is no text.
    """
    path = Path(model)
    check_name(path)
    if path.is_dir():
        check_links(path)
        return path
    if path.exists():
        raise BesaError(f"{model} is a file: give the directory that holds the model")
    if str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise BesaError(f"{model} does not exist")
    from huggingface_hub import snapshot_download

    # All but weights of other forms, and other forms of the model in folders of their own.
    others = [f"*{suffix}" for suffix in WEIGHTS if suffix != ".safetensors"]
    with one_line(f"{model} is no directory here and could not be fetched from the hub"):
        return Path(snapshot_download(str(model), ignore_patterns=[*others, "*/*.safetensors"]))


def model_directory(model: str | Path) -> Path:
    """The directory of a model that is whole: config, all shards, every shard to its end.

    An ONNX model's graph and data are for its engine to check.

    Args:
        model: a directory, or the id of a model on the hub.

    Raises:
        BesaError: nothing there, no model, an unfinished run of besa, or half a download.
    """
    path = Path(model)
    partial = path if path.suffix == ".partial" else Path(f"{path}.partial")
    if partial.is_dir() and (path == partial or not path.is_dir()):
        raise BesaError(
            f"{model} is not finished: run the command that began it again, it goes on from the "
            f"last finished block in {partial}"
        )
    directory = resolve(model)
    if is_onnx(directory):
        return directory
    if not (directory / "config.json").is_file():
        raise BesaError(f"{directory} is no model: it has no config.json")
    weight_files(directory)
    return directory


def is_onnx(directory: Path) -> bool:
    """Whether a directory holds an ONNX model, for ONNX Runtime GenAI."""
    return (directory / GENAI_CONFIG).is_file()


def weight_files(directory: Path) -> dict[str, Path]:
    """The safetensors file that holds each stored tensor, from the index and the file headers.

    Raises:
        BesaError: no safetensors, a missing or truncated file, a tensor that is not where the
            index says, an index that names other files than the model's own.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BesaError(f"{index} is damaged (it has no weight_map): download the model again")
        files = {name: _named_file(index, name, file) for name, file in weight_map.items()}
    elif (directory / SINGLE).is_file():
        files = {}
    else:
        raise BesaError(f"{directory} {_without_weights(directory)}")
    found: dict[str, Path] = {}
    for path in sorted(set(files.values())) or [directory / SINGLE]:
        if not path.is_file():
            raise BesaError(f"{path} is missing: the download of the model is not complete")
        try:
            with safe_open(path, framework="np") as opened:  # "pt" would import torch
                found.update(dict.fromkeys(opened.keys(), path))
        except (SafetensorError, OSError) as error:
            raise BesaError(
                f"{path} is damaged or cut off ({error}): download the model again"
            ) from None
    missing = sorted(set(files) - set(found))
    if missing:
        raise BesaError(f"{directory} lacks the tensor {missing[0]}, which its index lists")
    return {name: files.get(name, path) for name, path in found.items()}


def _named_file(index: Path, tensor: str, file: object) -> Path:
    """The file that an index names for a tensor: one of the index's own directory, or below it."""
    path = PurePosixPath(file) if isinstance(file, str) else None
    fits = path is not None and path.suffix == ".safetensors" and "\0" not in str(path)
    if path is None or not fits or path.is_absolute() or ".." in path.parts:
        raise BesaError(
            f"{index} says that {tensor} is in {str(file)[:80]!r}, which is no safetensors file of "
            "the model: download the model again"
        )
    return index.parent / path


def _without_weights(directory: Path) -> str:
    """What a directory without safetensors is, and how it gets them."""
    if not (directory / "config.json").is_file() and not any(directory.glob("*.gguf")):
        return "is no model: no config.json"
    what = "has no safetensors weights"
    arguments = ""
    if gguf := next(iter(sorted(directory.glob("*.gguf"))), None):
        arguments = f", gguf_file={gguf.name!r}"
    elif not any(path.suffix in (".bin", ".pt", ".pth") for path in directory.iterdir()):
        return what
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[part.from_pretrained({str(directory)!r}{arguments})"
        ".save_pretrained('FLOAT') for part in (M, T)]"
    )
    plain = not set(code) & set('"$`\\!')
    quoted = f'"{code}"' if plain else shlex.quote(code)
    return f"{what}: write them with python -c {quoted}, and take FLOAT"


@contextmanager
def open_tensors(files: Mapping[str, Path], names: list[str]) -> Iterator[dict[str, Any]]:
    """Lazy slices of the named tensors; the files are unmapped at the end."""
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for path in {files[name] for name in names}:
            opened[path] = stack.enter_context(safe_open(path, framework="pt"))
        yield {name: opened[files[name]].get_slice(name) for name in names}


def stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """The floating dtype that most stored tensors have."""
    import torch

    counts: dict[str, int] = defaultdict(int)
    for path in set(files.values()):
        with safe_open(path, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no dict
                counts[opened.get_slice(key).get_dtype()] += 1
    by_name = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    known = {name: count for name, count in counts.items() if name in by_name}
    if not known:
        raise BesaError(f"the weights are stored as {', '.join(counts)}: besa needs floats")
    return by_name[max(known, key=lambda name: known[name])]


def stored_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor, from the headers."""
    with open_tensors(files, list(files)) as tensors:
        return {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}


def whole_numbers(files: Mapping[str, Path]) -> dict[str, str]:
    """The stored tensors that are no floats, and what each is, from the headers: "I32", "BOOL"."""
    with open_tensors(files, list(files)) as tensors:
        found = {name: tensor.get_dtype() for name, tensor in tensors.items()}
    return {name: kind for name, kind in found.items() if kind.startswith(WHOLE)}


def not_of_floats(directory: Path, name: str, kind: str) -> BesaError:
    """What is wrong with a stored tensor of whole numbers where the model has floats."""
    return BesaError(f"{directory}: {name} is stored as {kind}, and has to be of floats")


def read_tensor(path: Path, name: str, remedy: str) -> Tensor:
    """A stored tensor, whole.

    Args:
        remedy: what to do if its file cannot be read, for the message.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise BesaError(f"{path} is damaged ({error}): {remedy}") from None


def stored_bytes(files: Mapping[str, Path]) -> dict[str, int]:
    """The bytes that each stored tensor takes, from the headers."""
    sizes = {}
    for path in set(files.values()):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name in files:  # and not the metadata
                start, end = tensor["data_offsets"]
                sizes[name] = end - start
    return sizes


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file atomically: it is there whole, or not at all."""
    from safetensors.torch import save_file

    with atomic(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
            partial.chmod(mode)  # safetensors leaves a file that its owner alone can read
        except SafetensorError as error:
            # It holds no error number; whether there was room for the file, the disk knows.
            needed = sum(tensor.nbytes for tensor in tensors.values())
            if shutil.disk_usage(path.parent).free < needed:
                raise OSError(errno.ENOSPC, str(error)) from None
            raise OSError(str(error)) from None
