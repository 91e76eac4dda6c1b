"""`segment_sum`, native and reference, against a loop over the elements."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from besa.kernels import native
from besa.kernels import segment_sum as module
from besa.kernels.segment_sum import segment_sum, segment_sum_reference

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="no C++ compiler, so no native kernels",
)
both = pytest.mark.parametrize("function", [segment_sum, segment_sum_reference])


def oracle(values: Tensor, buckets: Tensor, n_buckets: int, weight: Tensor | None) -> np.ndarray:
    out = np.zeros((values.shape[0], n_buckets))
    for (r, j), bucket in np.ndenumerate(buckets.numpy()):
        if bucket < n_buckets:
            factor = 1.0 if weight is None else float(weight[r, j])
            out[r, bucket] += float(values[r, j]) * factor
    return out


def integers(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Float32 integers so small that their sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, cols), generator=generator).float()


def bytes_below(n: int, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, n, (rows, cols), generator=generator, dtype=torch.uint8)


@both
@given(
    rows=st.integers(0, 5),
    cols=st.integers(0, 40),
    n_buckets=st.integers(1, 256),
    used=st.integers(1, 256),
    weighted=st.booleans(),
)
def test_equals_the_loop(function, rows, cols, n_buckets, used, weighted):
    # Buckets past n_buckets occur wherever used > n_buckets.
    values, buckets = integers(rows, cols), bytes_below(used, rows, cols)
    weight = integers(rows, cols, seed=2) if weighted else None
    out = function(values, buckets, n_buckets, weight)
    assert out.dtype == torch.float32
    assert out.shape == (rows, n_buckets)
    np.testing.assert_array_equal(out.numpy(), oracle(values, buckets, n_buckets, weight))


@both
def test_one_bucket_takes_the_whole_row(function):
    values = integers(3, 1001)
    buckets = torch.full((3, 1001), 255, dtype=torch.uint8)
    out = function(values, buckets, 256)
    assert torch.equal(out[:, 255], values.sum(1))
    assert not out[:, :255].any()


@both
def test_wide_rows_of_reals(function):
    generator = torch.Generator().manual_seed(0)
    values, weight = torch.randn(2, 4, 4099, generator=generator)
    buckets = bytes_below(101, 4, 4099)
    out = function(values, buckets, 101, weight)
    np.testing.assert_allclose(out.numpy(), oracle(values, buckets, 101, weight), atol=1e-4)


@both
def test_layout_does_not_matter(function):
    values, weight, buckets = integers(33, 20), integers(33, 20, seed=2), bytes_below(7, 33, 20)
    expected = function(
        values.t().contiguous(), buckets.t().contiguous(), 7, weight.t().contiguous()
    )
    for arguments in (
        (values.t(), buckets.t(), weight.t()),
        (values.t().contiguous(), buckets.t(), weight.t().contiguous()),
        (values.t().contiguous(), buckets.t().contiguous(), weight.t()),
    ):
        assert torch.equal(function(arguments[0], arguments[1], 7, arguments[2]), expected)


@both
def test_half_types_are_summed_in_float32(function):
    values = torch.ones(1, 1000, dtype=torch.bfloat16)  # bfloat16 cannot count past 256
    out = function(values, torch.zeros(1, 1000, dtype=torch.uint8), 2, values)
    assert out.tolist() == [[1000.0, 0.0]]


def test_reference_in_chunks(monkeypatch):
    values, buckets = integers(10, 30), bytes_below(5, 10, 30)
    expected = segment_sum_reference(values, buckets, 5)
    for chunk in (1, 61, 90):  # one, two and three rows at a time
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert torch.equal(segment_sum_reference(values, buckets, 5), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    values, weight, buckets = integers(9, 500), integers(9, 500, seed=2), bytes_below(101, 9, 500)
    out = segment_sum(values.cuda(), buckets.cuda(), 101, weight.cuda())
    assert out.is_cuda
    assert torch.equal(out.cpu(), segment_sum_reference(values, buckets, 101, weight))


@pytest.mark.parametrize(
    ("values", "buckets", "n_buckets", "weight", "message"),
    [
        (torch.ones(4), torch.zeros(4, dtype=torch.uint8), 2, None, "matrix"),
        (torch.ones(2, 2).int(), torch.zeros(2, 2, dtype=torch.uint8), 2, None, "floating"),
        (torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int64), 2, None, "uint8"),
        (torch.ones(2, 2), torch.zeros(2, 3, dtype=torch.uint8), 2, None, "buckets is"),
        (torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.uint8), 2, torch.ones(2, 1), "weight is"),
        (torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.uint8), 0, None, "1 to 256"),
        (torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.uint8), 257, None, "1 to 256"),
    ],
)
@both
def test_wrong_arguments_are_named(function, values, buckets, n_buckets, weight, message):
    with pytest.raises(ValueError, match=message):
        function(values, buckets, n_buckets, weight)


@needs_compiler
@pytest.mark.parametrize("weighted", [False, True])
def test_contiguous_float32_is_native_and_the_same_on_any_threads(monkeypatch, weighted):
    generator = torch.Generator().manual_seed(0)
    values, factors = torch.randn(2, 370, 1517, generator=generator)
    weight = factors if weighted else None
    buckets = bytes_below(101, 370, 1517)
    expected = oracle(values, buckets, 101, weight)

    def not_the_reference(*_):
        raise AssertionError("the reference served")

    monkeypatch.setattr(module, "segment_sum_reference", not_the_reference)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(segment_sum(values, buckets, 101, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    np.testing.assert_allclose(results[0].numpy(), expected, atol=1e-4)


def test_without_the_library_torch_serves_and_says_so_once(monkeypatch):
    monkeypatch.delenv("BESA_KERNELS", raising=False)
    monkeypatch.setattr(native, "NAME", "no_such_library.so")
    native.library.cache_clear()
    try:
        values, buckets = integers(3, 10), bytes_below(4, 3, 10)
        with pytest.warns(UserWarning, match=r"no_such_library\.so was not built"):
            out = segment_sum(values, buckets, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(segment_sum(values, buckets, 4), out)
        np.testing.assert_array_equal(out.numpy(), oracle(values, buckets, 4, None))
    finally:
        native.library.cache_clear()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_no_second_openmp_runtime():
    script = """
import re, torch

def runtimes():
    with open("/proc/self/maps") as maps:
        return {p for p in re.findall(r"/\\S+$", maps.read(), re.M) if re.search("/lib[gi]?omp", p)}

torch.ones(1 << 20).sum()
before = runtimes()
from besa.kernels import native
from besa.kernels.segment_sum import segment_sum
assert native.library() is not None
segment_sum(torch.ones(64, 64), torch.zeros(64, 64, dtype=torch.uint8), 2)
assert runtimes() == before, (before, runtimes())
"""
    subprocess.run([sys.executable, "-c", script], check=True)
