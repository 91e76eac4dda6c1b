"""What travels with a model's weights: every other file of its directory, and what does not.

>>> from pathlib import Path
>>> model = Path("path/to/model")
>>> found = companions_of(model, own=frozenset([model / "model.safetensors"]))
>>> [str(path) for path in found.copied]
['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
>>> found.left_out
()

Config, tokenizer, templates, code and license belong to the model, whatever they are called and
in whichever folder they are. Left out are weights, the model's own and those of other forms; a
folder that holds such weights, because it is another form of the whole model; and what is so large
that it can be no description.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from besa.errors import BesaWarning
from besa.model.links import check_link
from besa.writing import writing

# Suffixes of files with weights or with the state of a training, in any framework's form.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".nemo"),
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".data", ".npz", ".engine", ".plan"),
    *(".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".mar"),
)

# Beyond so many bytes a file, or a folder, is no description of a model: the largest tokenizers
# have half of that.
_LARGEST = 64 << 20

# What besa itself writes beside weights: it is of the run that wrote it.
_RECORDS = ("besa.json", "README.md", "report.html", "log.jsonl")


@dataclass(frozen=True)
class Companions:
    """What a directory holds beside its weights.

    Attributes:
        copied: files that travel along, relative to the directory, in order.
        left_out: what does not, for people: a name with its size.
    """

    copied: tuple[Path, ...]
    left_out: tuple[str, ...]


def companions_of(
    directory: Path, own: frozenset[Path] = frozenset(), out: Path | None = None
) -> Companions:
    """Looks through a model's directory; hidden files and indexes of weights are passed over.

    Args:
        own: files with the model's own weights, which are not worth a word.
        out: what is being written, which may lie within the directory.
    """
    copied: list[Path] = []
    left_out: list[str] = []
    for path in sorted(directory.iterdir()):
        if _is_passed_over(path, own, out):
            continue
        if path.is_file():
            files = [path]
        else:
            files = [] if path.is_symlink() else sorted(_files_below(path))
        total = sum(file.stat().st_size for file in files)
        if files and total <= _LARGEST and not any(file.suffix in WEIGHTS for file in files):
            copied += [file.relative_to(directory) for file in files]
        elif files:
            name = path.name if path.name.isprintable() else ascii(path.name)
            left_out.append(f"{name}{'/' if path.is_dir() else ''} ({total / 1e6:,.1f} MB)")
    return Companions(tuple(copied), tuple(left_out))


def copy_companions(directory: Path, own: frozenset[Path], out: Path) -> None:
    """Copies what travels along, and warns of what does not.

    Args:
        own: as in `companions_of`.

    Raises:
        BesaError: one could not be copied, or lies elsewhere by a link.
    """
    found = companions_of(directory, own, out)
    for name in found.copied:
        check_link(directory, directory / name)
        with writing(out / name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, out / name)
    if found.left_out:
        warnings.warn(
            f"not copied from {directory}: {', '.join(found.left_out)}; these are weights of other "
            f"forms, or larger than {_LARGEST >> 20} MiB: copy by hand what belongs to the model",
            BesaWarning,
            stacklevel=2,
        )


def _is_passed_over(path: Path, own: frozenset[Path], out: Path | None) -> bool:
    hidden = path.name.startswith(".") or path.name == "__pycache__"
    index = path.name.endswith(".index.json")
    growing = path.suffix == ".partial" or (out is not None and out.is_relative_to(path))
    return hidden or index or growing or path.name in _RECORDS or path in own


def _files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder but hidden ones; folders that are links are not followed."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _files_below(path)
