"""Compiled kernels on disk: found again, made anew when damaged, done without where none can be."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest

from besa.errors import BesaWarning
from besa.kernels.cuda import cache, compiler
from besa.kernels.cuda.cache import cached_cubin
from besa.kernels.cuda.compiler import CompileError, Cubin, Nvrtc

JOB: dict[str, Any] = {
    "source": '#include "h.cuh"\n__global__ void k(float* x) { *x = VALUE; }',
    "target": "sm_90",
    "name": "k",
    "headers": {"h.cuh": "#define VALUE 1"},
    "file": "k.cu",
    "driver": 13000,
}


@pytest.fixture
def compiled(monkeypatch):
    """The jobs that were compiled and not found."""
    jobs: list[tuple[object, ...]] = []
    compile_cubin = compiler.compile_cubin

    def counted(*arguments):
        jobs.append(arguments)
        return compile_cubin(*arguments)

    monkeypatch.setattr(compiler, "compile_cubin", counted)
    return jobs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    cache._say.cache_clear()
    return tmp_path / "cubins"


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_second_time_is_read(folder, compiled):
    first = cached_cubin(**JOB)
    assert first.image.startswith(b"\x7fELF")
    assert cached_cubin(**JOB) == first
    assert len(compiled) == 1
    assert [file.suffix for file in files(folder)] == [".cubin"]


@pytest.mark.parametrize(
    "change",
    [
        {"source": "__global__ void k(float* x) {}"},
        {"target": "sm_80"},
        {"headers": {"h.cuh": "#define VALUE 2"}},
        {"headers": {**JOB["headers"], "i.cuh": ""}},
        {"driver": 13010},
    ],
    ids=["source", "target", "header", "headers", "driver"],
)
def test_whatever_changes_is_compiled(folder, compiled, change):
    cached_cubin(**JOB)
    cached_cubin(**(JOB | change))
    assert len(compiled) == len(files(folder)) == 2


@pytest.mark.usefixtures("folder")
def test_another_nvrtc_or_option_is_compiled(compiled, monkeypatch):
    cached_cubin(**JOB)
    now = compiler.nvrtc()
    assert now is not None
    other = Nvrtc(now.library, (13, 9), now.architectures)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "nvrtc", lambda: other)
        cached_cubin(**JOB)
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-lineinfo"))
    cached_cubin(**JOB)
    assert len(compiled) == 3


DAMAGES = {
    "empty": lambda data: b"",
    "short": lambda data: data[:20],
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "head": lambda data: data.replace(b"symbol", b"symbod", 1),
    "one bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "other": lambda data: b"\x7fELF" + data,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_made_anew(folder, compiled, damage):
    first = cached_cubin(**JOB)
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(BesaWarning, match="is damaged; the kernel is compiled again") as said:
        assert cached_cubin(**JOB) == first
    assert len(said) == 1
    assert len(compiled) == 2
    assert file.read_bytes() == whole
    assert cached_cubin(**JOB) == first
    assert len(compiled) == 2


def test_unwritable_folder_is_said_once(folder, compiled, monkeypatch):
    folder.parent.joinpath("file").touch()
    # Where even root can't make a folder.
    monkeypatch.setenv("BESA_CACHE", str(folder.parent / "file"))
    with pytest.warns(BesaWarning, match="can't keep compiled kernels") as said:
        assert cached_cubin(**JOB) == cached_cubin(**JOB)
    assert len(said) == 1
    assert "BESA_CACHE" in str(said[0].message)
    assert len(compiled) == 2


def test_full_disk_leaves_nothing(folder, monkeypatch):
    def full(*_: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(BesaWarning, match="No space left on device"):
        cached_cubin(**JOB)
    assert files(folder) == []


@pytest.mark.usefixtures("folder")
def test_no_home(compiled, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BESA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    cached_cubin(**JOB)
    assert len(compiled) == 1


def test_where_it_is(monkeypatch):
    monkeypatch.delenv("BESA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.folder() == Path("/home/me/.cache/besa/cubins")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache.folder() == Path("/var/cache/me/besa/cubins")
    monkeypatch.setenv("BESA_CACHE", "/data")
    assert cache.folder() == Path("/data/cubins")


def test_errors_are_not_kept(folder):
    for _ in range(2):
        with pytest.raises(CompileError, match="undefined"):
            cached_cubin(**(JOB | {"source": "int y = x;"}))
    assert not folder.exists()


def _compile_at(barrier: Any, results: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.nvrtc()
        barrier.wait(timeout=120)
        results.put(cached_cubin(**JOB))


def test_processes_at_once_leave_one_whole_file(folder, compiled):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_compile_at, args=(barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    cubins: list[Cubin] = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert cubins[0] == cubins[1]
    assert len(files(folder)) == 1
    assert cached_cubin(**JOB) == cubins[0]
    assert compiled == []
