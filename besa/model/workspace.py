"""The output directory of a long run: resumable while it grows, whole when it appears.

All work goes to `OUT.partial` beside the output. A finished block is a shard and a record there;
the same command goes on from the last one. Only when everything is written does one rename make
it `OUT`, so that nothing that looks finished exists before it is.

Of several processes that share the work (`besa.processes.ranks`), process 0 writes. The others call
the same functions, wait for it, and get what it gets.

>>> from torch import zeros
>>> out, settings = Path("pruned"), {"sparsity": 0.5}
>>> with Workspace.open(out, settings, overwrite=False, needed_bytes=1000) as workspace:
...     shard = workspace.shard(1, of=1)
...     record = workspace.finish("block-00000", shard, {"weight": zeros(2, 2)}, {"zeros": 4})
...     workspace.write_index([record])
...     workspace.publish()
>>> sorted(path.name for path in out.iterdir())
['model-00001-of-00001.safetensors', 'model.safetensors.index.json']
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from besa.errors import BesaError, check_name, interruptible
from besa.model.files import INDEX, write_tensors
from besa.model.json_files import read_object
from besa.processes.ranks import ALONE, Ranks
from besa.writing import sha256, write_text, writing

# The longest that the name of an output gets while it is made.
_LONGEST_SUFFIX = ".rotated.writing"


@dataclass
class Workspace:
    """An unfinished output.

    Attributes:
        out: what it will be.
        path: where it grows.
        overwrite: whether what is at `out` goes.
        ranks: the processes that share the work, of which one writes.
    """

    out: Path
    path: Path
    overwrite: bool
    ranks: Ranks = ALONE
    _lock: IO[str] | None = None

    @classmethod
    def open(
        cls,
        out: Path,
        settings: Mapping[str, Any],
        overwrite: bool,
        needed_bytes: int,
        ranks: Ranks = ALONE,
    ) -> Workspace:
        """Makes the workspace, or finds the one that the same command left.

        Raises:
            BesaError: the output is not empty, another run is writing it or left it with other
                settings, the disk has not `needed_bytes` left, or not all processes see it.
        """
        path = out.with_name(out.name + ".partial")
        workspace = cls(out, path, overwrite, ranks)
        try:
            ranks.from_leader(lambda: workspace._begin(settings, needed_bytes))
            if not (path / "settings.json").exists():
                raise BesaError(
                    f"{platform.node()} does not see {path}, which process 0 made: give an --out "
                    "that all machines share"
                )
        except BaseException:
            workspace.close()
            raise
        return workspace

    def _begin(self, settings: Mapping[str, Any], needed_bytes: int) -> None:
        """Makes the directory, and locks it while this process lives."""
        check_free(self.out, self.overwrite)
        while (lock := _locked(self.path)) is None:
            check_free(self.out, self.overwrite)  # who had the lock has published its output
        self._lock = lock
        self._resume_or_begin(settings, needed_bytes)

    def _resume_or_begin(self, settings: Mapping[str, Any], needed_bytes: int) -> None:
        """Leaves what a run with the same settings has finished; else begins anew."""
        written = self.path / "settings.json"
        if written.exists():
            if self._was_begun_with(settings, written):
                return
            self._clear(keep=("lock",))
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            shutil.rmtree(self.path)
            raise BesaError(
                f"the disk is too full for {self.out}: {needed_bytes / 1e9:.1f} GB are needed, "
                f"{free / 1e9:.1f} GB are free"
            )
        write_text(json.dumps(settings, indent=2), written)

    def _was_begun_with(self, settings: Mapping[str, Any], written: Path) -> bool:
        """Whether the settings of the unfinished run are these.

        Raises:
            BesaError: they are others, and nothing may be overwritten.
        """
        try:
            found = read_object(written)
        except BesaError:
            found = {}
        wanted = json.loads(json.dumps(settings))  # tuples are lists in the file
        differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
        if differing and not self.overwrite:
            if not found:
                raise BesaError(f"{written} is damaged: remove {self.path}, or --overwrite")
            name = differing[0]
            raise BesaError(
                f"{self.path} holds an unfinished run with {name} = {found.get(name)}, not "
                f"{wanted.get(name)}: use the same settings, another --out, or --overwrite"
            )
        return not differing

    def begin_anew(self) -> None:
        """Removes what an earlier run left, for an output of which no half is worth keeping."""
        self._clear(keep=("lock", "settings.json"))

    def _clear(self, keep: Container[str]) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in keep:
                entry.unlink()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock is not None:
            self._lock.close()

    def interruptible(self) -> AbstractContextManager[None]:
        """Says of Ctrl-C inside how to go on."""
        return interruptible(
            f"{self.path} keeps what is finished, and the same command goes on from there"
        )

    def shard(self, number: int, of: int) -> Path:
        """The file of shard `number`, counted from 1."""
        return self.path / f"model-{number:05d}-of-{of:05d}.safetensors"

    def finish(
        self,
        name: str,
        shard: Path,
        tensors: dict[str, Tensor] | Callable[[], dict[str, Tensor]],
        record: Mapping[str, Any],
        check: Callable[[Path], None] = lambda path: None,
    ) -> dict[str, Any]:
        """Writes a shard, lets `check` read it, then writes the record that it is finished.

        Args:
            tensors: what is written, or what makes it, where only the process that writes needs to.
        """

        def write() -> dict[str, Any]:
            made = tensors if isinstance(tensors, dict) else tensors()
            write_tensors(made, shard)
            check(shard)
            whole = {"file": shard.name, "sha256": sha256(shard), "keys": list(made), **record}
            write_text(json.dumps(whole), self.path / f"{name}.finished.json")
            return whole

        return self.ranks.from_leader(write)

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record of a shard that is finished and unharmed, or None."""

        def read() -> dict[str, Any] | None:
            try:
                path = self.path / f"{name}.finished.json"
                record: dict[str, Any] = json.loads(path.read_text())
                unharmed = sha256(self.path / record["file"]) == record["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                return None
            return record if unharmed else None

        return self.ranks.from_leader(read)

    def remember(self, name: str, value: Any) -> Any:
        """Keeps a value, JSON, until the output is whole; gives it back."""
        if self.ranks.leads:
            write_text(json.dumps(value), self.path / f"{name}.finished.json")
        return value

    def remembered(self, name: str) -> Any:
        """What `remember` kept, or None.

        Raises:
            BesaError: it is there, and damaged.
        """
        path = self.path / f"{name}.finished.json"

        def read() -> Any:
            try:
                return json.loads(path.read_text()) if path.exists() else None
            except ValueError:
                raise BesaError(f"{path} is damaged: remove {self.path}, or --overwrite") from None

        return self.ranks.from_leader(read)

    def log(self, event: Mapping[str, Any]) -> None:
        """Adds a line to log.jsonl."""
        if not self.ranks.leads:
            return
        path = self.path / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    def write_index(self, records: list[dict[str, Any]]) -> None:
        """Writes the index that says which shard holds which tensor."""
        weight_map = {key: record["file"] for record in records for key in record["keys"]}
        size = sum((self.path / record["file"]).stat().st_size for record in records)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(json.dumps(index, indent=2), self.path / INDEX)

    def abandon(self) -> None:
        """Removes what was written: nothing of it is worth going on from."""
        shutil.rmtree(self.path)

    def publish(self) -> None:
        """Turns the workspace into the output."""
        # A run that was killed may have left what safetensors was writing, as `.tmpXXXXXX`.
        for pattern in ("*.finished.json", "*.activations", "*.writing", ".tmp*"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)  # another process may remove its own
        (self.path / "settings.json").unlink()
        (self.path / "lock").unlink()
        publish(self.path, self.out, self.overwrite)


def _locked(path: Path) -> IO[str] | None:
    """The lock of a directory that grows, which is made; None if it was published meanwhile.

    The kernel lets go of it when the process ends, however that does.

    Raises:
        BesaError: another run has it, or nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise BesaError(f"cannot write to {path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), (path / "lock").stat()):
            return lock
    except FileNotFoundError:
        pass
    except OSError:
        lock.close()
        raise BesaError(f"another besa is writing {path}: let it end, or end it") from None
    lock.close()
    return None


def publish(path: Path, out: Path, overwrite: bool) -> None:
    """Renames what is complete to what it is to be called.

    Args:
        overwrite: what is there by that name goes.
    """
    replaced = out.with_name(out.name + ".replaced")
    try:
        if overwrite and out.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            out.rename(replaced)
        path.rename(out)
        if overwrite and replaced.exists():  # perhaps of a run that ended between the renames
            shutil.rmtree(replaced)
    except OSError as error:
        raise BesaError(
            f"all is done, but {path} could not be renamed to {out} ({error.strerror}): rename it "
            "by hand"
        ) from None


def check_free(out: Path, overwrite: bool) -> None:
    """Raises a BesaError if `out` cannot become the output."""
    check_name(out)
    try:
        out.with_name(out.name + _LONGEST_SUFFIX).exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise BesaError(f"--out {out} is too long a name: give a shorter one") from None
    except ValueError:  # no name at all
        pass
    if out.name in ("", ".."):
        raise BesaError(f"--out {out} has no name of its own: give a new directory's")
    if out.is_symlink():
        raise BesaError(f"{out} is a link: give the directory that it points to")
    if out.is_mount():
        raise BesaError(f"{out} is a mount point: give a new directory in it, {out}/pruned")
    if out.exists() and not out.is_dir():
        raise BesaError(f"{out} is a file: give another --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise BesaError(f"{out} is not empty: give another --out, or --overwrite")
