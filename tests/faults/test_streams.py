"""Standard streams that take nothing, folders that are gone, clocks that jump: besides the work."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from besa.cli import main
from tests.export.sparse import pruned_model
from tests.helpers import Process, digests, run, small_disk


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_model("llama", tmp_path_factory.mktemp("models") / "pruned", tiny_model)


@pytest.fixture(scope="module")
def whole(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("whole")
    process = run("export", pruned, "--out", "out", cwd=directory)
    assert process.returncode == 0, process.errors
    return digests(directory / "out")


def in_child(work: Callable[[], object], stderr: Path) -> int:
    """The exit code of `work`, with its errors in a file."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
        code = 99
        try:
            code = int(work() or 0)
        except SystemExit as end:  # rich's, where a pipe is broken
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def to(file: int | None, arguments: list[str]) -> int:
    """`besa` with a standard output of its own; None closes it."""
    if file is None:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment] - as Python begins without one
    else:
        os.dup2(file, 1)
        sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    return main(arguments)


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("full", 2, "what it found could not be printed: No space left on device"),
        ("broken", 1, ""),
        ("closed", 0, ""),
    ],
)
def test_a_standard_output_that_takes_nothing(
    kind: str, code: int, words: str, pruned: Path, whole: dict[str, str], tmp_path: Path
):
    """The work is done and whole; only what it found cannot be shown."""

    def work() -> int:
        os.chdir(tmp_path)
        ours, theirs = os.pipe()
        os.close(ours)
        files = {"broken": theirs, "closed": None, "full": os.open("/dev/full", os.O_WRONLY)}
        return to(files[kind], ["export", str(pruned), "--out", "out"])

    assert in_child(work, tmp_path / "stderr") == code
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert "Traceback" not in "\n".join(lines)
    assert (lines[-1] == f"besa export: {words}") == bool(words)
    assert digests(tmp_path / "out") == whole


def test_a_pipe_that_nobody_empties_waits(pruned: Path, whole: dict[str, str], tmp_path: Path):
    """A full pipe stops the run where it is; it goes on once somebody reads."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while os.write(theirs, b"." * 4096):
            pass
    os.set_blocking(theirs, True)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.chdir(tmp_path)
            os.dup2(theirs, 2)
            code = to(theirs, ["export", str(pruned), "--out", "out"])
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, "rb") as reader:
        said = reader.read().lstrip(b".")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"packing model.layers.0" in said
    assert digests(tmp_path / "out") == whole


def test_files_are_not_opened_under_the_numbers_of_closed_streams(tmp_path: Path):
    """What a library prints would go into the model."""

    def work() -> int:
        os.closerange(0, 3)
        with pytest.raises(SystemExit):
            main(["--version"])
        return os.open(tmp_path / "model.safetensors", os.O_CREAT | os.O_WRONLY)

    assert in_child(work, tmp_path / "stderr") >= 3


def test_without_shared_memory(pruned: Path, whole: dict[str, str], tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can hide a folder")
    process = run("export", pruned, "--out", "out", cwd=tmp_path, without=[Path("/dev/shm")])
    if "unshare" in process.errors or "mount" in process.errors:
        pytest.skip("this machine lets nobody hide a folder")
    assert process.returncode == 0, process.errors
    assert digests(tmp_path / "out") == whole


def refused(process: Process) -> str:
    *_, line = process.errors.splitlines()
    assert process.returncode == 2, process.errors
    assert line.startswith("besa export: ")
    return line


def test_a_disk_that_may_not_be_written(pruned: Path, tmp_path: Path):
    with small_disk(tmp_path / "disk", "8M") as disk:
        os.system(f"mount -o remount,ro {disk}")
        process = run("export", pruned, "--out", disk / "out", cwd=tmp_path)
        assert "cannot write to" in refused(process)
        assert "Read-only file system" in refused(process)


@pytest.mark.parametrize("year", [1971, 2100])
def test_times_of_files_do_not_matter(
    year: int, pruned: Path, whole: dict[str, str], tmp_path: Path
):
    """A run that was killed goes on, whatever the clock says of what it left."""
    killed = run(
        *("export", pruned, "--out", "out"),
        cwd=tmp_path,
        operations={"within": "block-00001.finished.json", "kill_at": 1},
    )
    assert killed.returncode == -signal.SIGKILL
    moment = time.mktime((year, 1, 1, 0, 0, 0, 0, 0, 0))
    for path in (tmp_path / "out.partial").iterdir():
        os.utime(path, (moment, moment))
    process = run("export", pruned, "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "finished before: model.layers.0\n" in process.errors
    assert digests(tmp_path / "out") == whole


def test_a_clock_that_goes_backwards(
    pruned: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from besa.export import ExportConfig, export

    clock = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    export(pruned, ExportConfig(out=tmp_path / "out"))
    assert digests(tmp_path / "out") == whole
    assert json.loads((tmp_path / "out/besa.json").read_text())["seconds"] >= 0
