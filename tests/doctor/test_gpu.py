"""What `besa doctor` says of GPUs, made up where there are none: products run on the CPU."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from besa import machine
from besa.cli import doctor as command
from besa.cli import main
from besa.doctor import examine, gpu, speed
from besa.doctor.gpu import KINDS, Product, examine_gpus, pruned, ways_of
from besa.doctor.report import DoctorReport, Gpus
from besa.errors import BesaWarning
from besa.kernels.cuda import cache, candidates, compiler, driver, tuning
from besa.kernels.cuda.call import Shape
from besa.kernels.cuda.linear import shape_of
from besa.kernels.cuda.records import Records
from besa.kernels.cuda.tuning import Table
from besa.machine import Gpu
from besa.typed_json import from_json, to_json

H100 = Gpu("NVIDIA H100", 80 * 2**30, "9.0", "580.65")
OLD = Gpu("NVIDIA T4", 16 * 2**30, "7.5", "580.65")
TOO_OLD = "GPU 1 has compute capability 7.5, and the kernels need 8.0 (Ampere)"
NO_NVRTC = "no NVRTC (libnvrtc.so), which compiles them: pip install nvidia-cuda-nvrtc"
LIKE_H100 = candidates.Gpu(multiprocessors=132, capability=(9, 0))


def tuned(records: Records, scale: torch.Tensor | None, x: torch.dtype, int8_input: bool) -> Table:
    """As if it had been measured: each bucket takes 10 µs more than the one before."""
    shape = shape_of(records, scale, x, int8_input)
    assert shape is not None
    guess = tuning.untimed(shape, LIKE_H100)
    return Table(
        tuple(
            replace(choice, us=10.0 + 10 * i if choice.candidates > 1 else None)
            for i, choice in enumerate(guess.choices)
        )
    )


def seconds_of(contenders: Sequence[Sequence[Product]], _: torch.device) -> list[float]:
    """By the clock, a thousand times as fast as the CPU is."""
    found = []
    for products in contenders:
        started = time.perf_counter()
        products[0]()
        found.append((time.perf_counter() - started) / 1e3)
    return found


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """Those that torch sees; a test may add some. Products run on the CPU, by their oracle."""
    there = [H100]
    monkeypatch.setattr(machine, "gpus", lambda: there)
    monkeypatch.setattr(
        driver,
        "unavailable",
        lambda device: TOO_OLD if there[device.index] is OLD else None,
    )
    nvrtc = compiler.Nvrtc(None, (13, 0), (80, 90))  # type: ignore[arg-type]
    monkeypatch.setattr(compiler, "nvrtc", lambda: nvrtc)
    monkeypatch.setenv("BESA_CACHE", "/cache")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**36))
    measure = gpu.measure
    monkeypatch.setattr(gpu, "measure", lambda device: measure(torch.device("cpu"), 128))
    monkeypatch.setattr(gpu, "tuned", tuned)
    monkeypatch.setattr(gpu, "seconds_of", seconds_of)
    monkeypatch.setattr(gpu, "_WORKING_SET", 2**16)
    monkeypatch.setattr(gpu, "_COPIED", 2**20)
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    monkeypatch.setattr(speed, "SIZE", 128)
    monkeypatch.setattr(speed, "bytes_to_measure", lambda: 2**20)
    return there


def shown(capsys: pytest.CaptureFixture[str], columns: int = 100) -> str:
    with pytest.MonkeyPatch.context() as width:
        width.setenv("COLUMNS", str(columns))
        assert main(["doctor"]) == 0
    return capsys.readouterr().out


def found_on(gpus: list[Gpu]) -> Gpus:
    found = examine_gpus(gpus)
    assert found is not None
    return found


def test_none_without_a_gpu() -> None:
    assert examine_gpus([]) is None


def test_each_kind_is_measured_and_explained(gpus: list[Gpu]) -> None:
    found = found_on(gpus)
    assert (found.nvrtc, found.cache) == ("13.0", "/cache")
    (one,) = found.gpus
    assert one.problem is one.unmeasured is one.same_as is None
    assert [product.kind for product in one.products] == ["50%", "2:4", "int8 50%"]
    for product, paths in zip(one.products, ("kernel", "2:4", "kernel"), strict=True):
        assert product.speedup == product.dense_seconds / product.sparse_seconds
        assert product.dtype == ("int8" if product.kind.startswith("int8") else "bfloat16")
        assert (product.ways[0].first, product.ways[0].last) == (1, 1)
        assert product.ways[-1].last is None
        for before, after in zip(product.ways, product.ways[1:], strict=False):
            assert before.last is not None
            assert after.first == before.last + 1
        assert product.ways[0].path == paths
        assert product.ways[0].seconds == pytest.approx(1e-5)
        assert product.ways[0].candidates > 1
        assert product.ways[-1].path == "expansion"
        assert product.ways[-1].seconds is None


def test_half_of_a_weight_is_pruned() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128)
    for kind in KINDS:
        packed = pruned(weight, kind, generator)
        assert packed.density == pytest.approx(0.5, abs=0.02)
        if kind.two_four:
            kept = (packed.unpack(torch.float32) != 0).view(64, 32, 4).sum(2)
            assert (kept == 2).all()


def test_gpus_of_one_kind_are_measured_once(gpus: list[Gpu]) -> None:
    gpus += [OLD, H100]
    first, second, third = found_on(gpus).gpus
    assert first.products
    assert second.problem == TOO_OLD
    assert (second.products, second.same_as) == ((), None)
    assert (third.products, third.same_as) == ((), 0)


def test_a_guess_is_called_one() -> None:
    shape = Shape(4096, 4096, torch.bfloat16, torch.bfloat16, False, 1280, 0, False)
    ways = list(ways_of(tuning.untimed(shape, LIKE_H100), two_four=False))
    assert {way.seconds for way in ways} == {None}
    line = command._way(ways[:2])
    assert line == "1 to 8 tokens: kernel, not measured, the first guess"
    assert command._way(ways[-1:]) == "from 2049 tokens: expansion, the only way"


@pytest.mark.parametrize("columns", [60, 100])
def test_lines(gpus: list[Gpu], capsys: pytest.CaptureFixture[str], columns: int) -> None:
    gpus.append(OLD)
    text = shown(capsys, columns)
    assert max(map(len, text.splitlines())) <= columns
    words = re.sub(r"\s+", " ", text)
    assert "besa's kernels run there, compiled by NVRTC 13.0, kept in /cache" in words
    assert f"torch multiplies there, whatever the tokens: {TOO_OLD}" in words
    assert words.count(TOO_OLD) == 1
    assert re.search(r"on GPU 0 \d+ GB/s from and to its memory, by a copy", words)
    assert re.search(
        r"2:4 128×128, 1 token: F\.linear \S+ µs, besa \S+ µs \(\S+×, \d+% of the read limit\)",
        words,
    )
    assert re.search(
        r"tokens: 2:4, 10 to \d+ µs, the fastest of \d+ to \d+ ways from \d+ tokens: expansion, "
        r"the only way int8 50%",
        words,
    )


def test_json_is_the_report(gpus: list[Gpu], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["gpus"] == to_json([gpus[0]])
    report = from_json(DoctorReport, record)
    assert report.record_version == 2
    assert report.gpu_kernels is not None
    assert report.gpu_kernels.gpus[0].products[0].ways[0].path == "kernel"
    assert to_json(report) == record


def test_without_nvrtc_torch_serves(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler, "nvrtc", lambda: None)
    monkeypatch.setattr(driver, "unavailable", lambda device: NO_NVRTC)
    found = found_on(gpus)
    assert found.nvrtc is None
    assert found.gpus[0].problem == NO_NVRTC
    text = shown(capsys, 10_000)
    assert text.count("NVRTC") == 1
    assert f"torch multiplies there, whatever the tokens: {NO_NVRTC}\n" in text


def test_a_full_gpu_is_not_measured(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 2**36))
    monkeypatch.setattr(gpu, "_NEEDED", 2**30)
    (one,) = found_on(gpus).gpus
    assert one.unmeasured == "3 MiB of its memory are free, and to measure takes 1024"
    assert f"on GPU    not measured: {one.unmeasured}\n" in shown(capsys, 10_000)


def test_what_fails_is_one_line(gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(gpu, "tuned", full)
    (one,) = found_on(gpus).gpus
    assert one.unmeasured == "CUDA out of memory."


@pytest.mark.usefixtures("gpus")
def test_what_is_said_meanwhile_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*arguments: object, **named: object) -> Table:
        cache._say("/cache/x.cubin is damaged; the kernel is compiled again")
        return tuned(*arguments, **named)  # type: ignore[arg-type]

    cache._say.cache_clear()
    monkeypatch.setattr(gpu, "tuned", damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BesaWarning)
        report = examine.examine()
    assert [line for line in report.warnings if "damaged" in line] == [
        "/cache/x.cubin is damaged; the kernel is compiled again"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    found = found_on(machine.gpus())
    assert len(found.gpus) == torch.cuda.device_count()
    for one in found.gpus:
        assert one.unmeasured is None
        if one.problem is not None or one.same_as is not None:
            continue
        assert one.read_bandwidth is not None
        assert 1e10 < one.read_bandwidth < 1e14
        for product in one.products:
            assert 0 < product.share_of_read_bandwidth < 1.3
            assert product.ways[0].seconds is not None
            assert product.ways[0].seconds == pytest.approx(product.sparse_seconds, rel=1)
