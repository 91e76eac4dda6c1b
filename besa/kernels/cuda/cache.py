"""Keeps compiled kernels on disk, so that a process after the first one need not compile.

The folder is `$BESA_CACHE/cubins`, by default `~/.cache/besa/cubins`; it may be deleted at any
time. A file is named by the hash of all that its content depends on, and starts with the hash of
its content: a damaged one is noticed and made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from besa.errors import BesaWarning
from besa.kernels.cuda import compiler
from besa.kernels.cuda.compiler import Cubin

# Of files, with the format's version.
MAGIC = b"besa cubin 1\n"


def folder() -> Path | None:
    """Where compiled kernels are; None for a user who has no home."""
    if chosen := os.environ.get("BESA_CACHE"):
        return Path(chosen) / "cubins"
    try:
        usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(usual) / "besa" / "cubins"


def cached_cubin(
    source: str, target: str, name: str, headers: Mapping[str, str], file: str, driver: int
) -> Cubin:
    """The kernel from the disk, or compiled and put there.

    Args:
        driver: its version (cuDriverGetVersion). The rest is as for `compiler.compile_cubin`.

    Raises:
        CompileError: the source is wrong, or there is no compiler.
    """
    found = compiler.nvrtc()
    version = None if found is None else found.version
    parts = (source, target, name, sorted(headers.items()), compiler.OPTIONS, version, driver)
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    home = folder()
    path = None if home is None else home / f"{key}.cubin"
    if path is not None and (kept := _read(path)) is not None:
        return kept
    cubin = compiler.compile_cubin(source, target, name, headers, file)
    if path is not None:
        _write(path, cubin)
    return cubin


def _read(path: Path) -> Cubin | None:
    try:
        data = path.read_bytes()
    except OSError:  # most often, because there is none
        return None
    start = len(MAGIC) + hashlib.sha256().digest_size
    content = data[start:]
    if data[:start] != _beginning(content):
        _say(f"{path} is damaged; the kernel is compiled again")
        return None
    head, image = content.split(b"\n", 1)
    return Cubin(image, **json.loads(head))


def _write(path: Path, cubin: Cubin) -> None:
    head = json.dumps({"symbol": cubin.symbol, "log": cubin.log}).encode()
    content = head + b"\n" + cubin.image
    partial = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name of its own: other processes may be writing the same kernel.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name, suffix=".writing", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(_beginning(content) + content)
        partial.replace(path)
    except OSError as error:
        _say(
            f"can't keep compiled kernels in {path.parent} ({error.strerror}): every process "
            "compiles them again, unless BESA_CACHE names another folder"
        )
        if partial is not None:
            partial.unlink(missing_ok=True)


def _beginning(content: bytes) -> bytes:
    return MAGIC + hashlib.sha256(content).digest()


@cache
def _say(message: str) -> None:
    """Warns, once."""
    warnings.warn(message, BesaWarning, stacklevel=2)
