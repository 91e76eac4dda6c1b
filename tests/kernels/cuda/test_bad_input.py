"""What goes wrong outside of besa is one line, or a slower way: full GPUs, damaged tables, devices.

Compiled kernels that are damaged are in test_cache.py, drivers and NVRTC in test_driver.py.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from besa.errors import BesaError, BesaWarning
from besa.formats import pack
from besa.formats.module import SparseLinear
from besa.kernels.cuda import candidates, driver, libcuda, tuning
from besa.kernels.cuda import linear as gpu
from besa.kernels.cuda.call import Call, Shape
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.linear import records_linear
from besa.kernels.cuda.records import Records, fitting, parts, to_records
from besa.kernels.cuda.tuning import BUCKETS, Choice, Table

BF16 = torch.bfloat16
PACKED = pack(torch.eye(512, 640).bfloat16())


def full(*_: object) -> Records:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB.\nGPU 0 has")


# ---- a GPU without enough memory


def test_no_room_for_records_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 << 20)
    with pytest.raises(BesaError) as error, fitting(PACKED, 640, torch.device("cuda:1")):
        full()
    assert str(error.value) == (
        "cuda:1 has no room for a packed weight of 512 x 640: it takes 0 MiB, and 129 MiB while it "
        "is laid out for the GPU, where 4 MiB of 81920 are left; spread the model over more GPUs, "
        "end what else uses this one, or export the model with int8 values"
    )
    assert error.value.__suppress_context__


@pytest.mark.parametrize("step", ["to_records", "tuned"])
def test_a_linear_without_room_is_as_it_was(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    linear = SparseLinear(PACKED, nn.Parameter(torch.ones(512).bfloat16(), requires_grad=False))
    x = torch.randn(2, 640).bfloat16()
    before = linear(x)
    monkeypatch.setattr(gpu, "usable", lambda device, values: True)
    monkeypatch.setattr(gpu, step, full)
    with pytest.raises(BesaError, match="no room for a packed weight of 512 x 640"):
        linear.to("cpu")
    assert linear.records is None
    assert torch.equal(linear(x), before)


# ---- tensors on different devices


def test_tensors_on_two_devices() -> None:
    records = to_records(*parts(PACKED), 640)
    there = torch.empty(1, 640, dtype=BF16, device="meta")
    with pytest.raises(ValueError, match=r"^x is on meta, but a part of the weight on cpu$"):
        gpu._check(there, records, None, None)
    with pytest.raises(ValueError, match=r"^x is on cpu, but a part of the weight on meta$"):
        gpu._check(torch.empty(1, 640), records, None, torch.empty(512, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_x_beside_the_gpu() -> None:
    records = to_records(*parts(PACKED.to("cuda")), 640)
    with pytest.raises(ValueError, match=r"^x is on cpu, but a part of the weight on cuda:0$"):
        records_linear(torch.empty(1, 640, dtype=BF16), records)


# ---- damaged tables of ways


SHAPE = Shape(512, 640, BF16, BF16, False, 1280, 0, False)
OTHER = Shape(512, 1280, BF16, BF16, False, 1280, 0, False)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Table]]:
    """Gives the table of a shape, as another process would; `measured` lists those measured."""
    some = candidates.Gpu(multiprocessors=132, capability=(9, 0))
    monkeypatch.setenv("BESA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(candidates.Gpu, "of", lambda device: some)
    measured: list[Shape] = []

    def measure(call: Call, tried: list[tuple[int, list[tuning.Way]]]) -> Table:
        measured.append(call.shape)
        best = [Choice(ways[-1], 5.5, len(ways)) for _, ways in tried]
        return Table((*best, Choice(Expand())))

    monkeypatch.setattr(tuning, "_measure", measure)

    def table(shape: Shape = SHAPE) -> Table:
        measured.clear()
        tuning._tables.clear()
        tuning._kept.cache_clear()
        empty = torch.empty(0)
        return tuning.table(Call(shape, empty, None, None, None, empty, empty))

    table.measured = measured  # type: ignore[attr-defined]
    yield table
    tuning._tables.clear()
    tuning._kept.cache_clear()


def file_in(folder: Path) -> Path:
    (file,) = (folder / "tuning").iterdir()
    return file


def test_tables_are_kept(tuned, tmp_path):
    first = tuned()
    assert tuned.measured == [SHAPE]
    other = tuned(OTHER)
    assert tuned() == first
    assert tuned.measured == []
    assert first.choices[0].candidates > 1
    assert tuned(OTHER) == other
    assert tuned.measured == []
    assert len(json.loads(file_in(tmp_path).read_text())) == 2


DAMAGES = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1, 2]",
    "bytes": lambda text: "\0" * 20,
    "no tables": lambda text: '{"rows": 1}',
    "another way": lambda text: text.replace('"Expand"', '"Fly"'),
    "fields": lambda text: text.replace('"warps"', '"worps"'),
    "short": lambda text: json.dumps({name: table[:3] for name, table in json.loads(text).items()}),
    "values": lambda text: text.replace('"resident": ', '"resident": 9'),
    "types": lambda text: text.replace('"resident": ', '"resident": true, "ignored": '),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_table_is_measured_again_and_once(tuned, tmp_path, damage):
    first = tuned()
    file = file_in(tmp_path)
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert tuned() == first
    assert tuned.measured == [SHAPE]
    assert file.read_text() == whole
    assert tuned() == first
    assert tuned.measured == []


def test_no_memory_to_time_in(tuned, tmp_path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> Table:
        raise torch.OutOfMemoryError("CUDA out of memory.\nA long story.")

    monkeypatch.setattr(tuning, "_measure", fails)
    tuning._say_untimed.cache_clear()
    with pytest.warns(BesaWarning, match=r"could not be timed.*: CUDA out of memory\.$"):
        found = tuned()
    assert found == tuning.untimed(SHAPE, candidates.Gpu(132, (9, 0)))
    assert not (tmp_path / "tuning").exists()


def test_every_bucket_has_a_way(tuned):
    found = tuned()
    for tokens in (1, 7, *BUCKETS, 5000):
        assert found.way(tokens).kernels(SHAPE, min(tokens, BUCKETS[-1])) is not None


def test_an_older_driver_than_any_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    libcuda.open_library.cache_clear()
    driver._reason.cache_clear()
    monkeypatch.delenv("BESA_CUDA", raising=False)
    try:
        reason = driver.unavailable(torch.device("cuda:0"))
    finally:
        libcuda.open_library.cache_clear()
        driver._reason.cache_clear()
    assert reason == "the NVIDIA driver is older than CUDA 11.8: update the driver"
