"""The digests that besa.json holds of a directory's files, made and checked.

>>> check_digests(Path("path/to/sparse"))
9
>>> import shutil
>>> copy = Path(shutil.copytree("path/to/sparse", "copy"))
>>> with (copy / "config.json").open("a") as config:
...     print(file=config)
>>> check_digests(copy)
Traceback (most recent call last):
besa.errors.BesaError: copy/config.json is not what besa wrote there: ...

What loads a model notices by itself where a file is cut off or its parts do not fit each other.
Digests notice where a number became another one. That takes as long as to read all of it, so it is
done where someone asks: `besa serve --verify`, `besa doctor MODEL`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from besa.errors import BesaError
from besa.model.json_files import read_object
from besa.writing import sha256

_RECORD = "besa.json"

# What besa writes for people, or for itself while a directory grows, and what belongs to no model.
_PASSED_OVER = (
    *(_RECORD, "README.md", "report.html", "log.jsonl", "settings.json", "lock", ".*"),
    *("*.finished.json", "*.activations", "*.writing"),
)


def companion_digests(directory: Path, weights: Container[str]) -> dict[str, str]:
    """The SHA-256 of each file of a directory that a model is read from, but for its weights.

    Args:
        weights: the names of their files.
    """
    return {
        path.name: sha256(path)
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.name not in weights
        and not any(fnmatch(path.name, pattern) for pattern in _PASSED_OVER)
    }


def check_digests(directory: Path) -> int:
    """Checks that each file is, to the last bit, what besa wrote; tells how many there are.

    Raises:
        BesaError: one is not, or is missing, or no digests are there to tell.
    """
    path = directory / _RECORD
    if not path.is_file():
        raise BesaError(f"{directory} cannot be verified: it has no besa.json with digests")
    record = read_object(path, "copy or make the model again")
    digests = {**_digests(record, "digests"), **_digests(record, "companion_digests")}
    if not digests:
        raise BesaError(f"{directory} cannot be verified: its besa.json has no digests")
    for name, digest in digests.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise BesaError(f"{file} is missing, which besa wrote: copy or make the model again")
        if sha256(file) != digest:
            raise BesaError(
                f"{file} is not what besa wrote there: copy or make the model again, unless you "
                "changed it yourself"
            )
    return len(digests)


def _digests(record: Mapping[str, Any], key: str) -> dict[str, str]:
    found = record.get(key)
    return dict(found) if isinstance(found, Mapping) else {}
