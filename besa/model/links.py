"""Links in a model's directory: those of the hub's cache are followed, others out of it refused.

>>> check_links(Path("path/to/model"))
>>> Path("downloaded").mkdir()
>>> Path("downloaded/vocab.txt").symlink_to("/etc/passwd")
>>> check_links(Path("downloaded"))
Traceback (most recent call last):
besa.errors.BesaError: downloaded/vocab.txt is a link out of the model, to /etc/passwd: put ...

An archive may hold a link to any file of the machine that unpacks it. What is read through it would
be copied into what besa writes, and published with that. The hub's cache keeps a model's files in
`models--NAME/blobs` and links to them from `models--NAME/snapshots/REVISION`.
"""

from __future__ import annotations

import os
from pathlib import Path

from besa.errors import BesaError


def check_links(directory: Path) -> None:
    """Raises a BesaError for what is no file of a directory, but a link out of it or a device.

    Hidden entries are passed over, and so are folders.
    """
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.is_symlink():
            check_link(directory, path)
        elif not path.is_file():  # who opens a pipe waits for ever
            raise BesaError(f"{path} is no file, but a pipe or a device: remove it")


def check_link(directory: Path, path: Path) -> None:
    """Raises a BesaError if a file of a model, at any depth, lies elsewhere by a link."""
    # Where a link leads to itself, `Path.resolve` would raise.
    home, target = (Path(os.path.realpath(each)) for each in (directory, path))
    if target.is_relative_to(home):
        return
    in_cache = home.parent.name == "snapshots"
    if in_cache and target.is_relative_to((home.parents[1] / "blobs").resolve()):
        return
    raise BesaError(
        f"{path} is a link out of the model, to {target}: put the file itself there, or give the "
        "directory that it lies in"
    )
