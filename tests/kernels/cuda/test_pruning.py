"""The pruning kernels, emulated, against the torch references and loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from besa.kernels.cuda import buckets as bucket_kernels
from besa.kernels.cuda import compensate as compensate_kernel
from besa.kernels.cuda import compiler
from besa.kernels.cuda import n_of_m as n_of_m_kernel
from besa.kernels.cuda.call import Needed
from besa.kernels.mask_buckets import mask_buckets, mask_buckets_reference
from besa.kernels.segment_sum import segment_sum, segment_sum_reference
from besa.model.blocks import find_linears
from besa.pruning import compensate as module
from besa.pruning import patterns
from besa.pruning.allocate import RankedMatrix, RateLearner, RateMask, rank_buckets
from besa.pruning.batches import Group
from besa.pruning.compensate import block_errors_reference, inverse_factor
from besa.pruning.config import Pattern
from besa.pruning.learn import learn_step
from besa.pruning.masked import WeightFactory, masked
from besa.pruning.methods.sparsegpt import sparsegpt
from besa.pruning.patterns import lowest_pruned_overall, n_of_m, n_of_m_reference
from besa.pruning.updates import obs
from tests.kernels.cuda.emulation import driver_on_cpu, guarded, needs_compiler
from tests.kernels.cuda.gpus import TARGETS, compiled

TYPES = [torch.bfloat16, torch.float16, torch.float32]
# Columns: none, one, odd, a row's tail of eights, more than a block's threads take at once.
SHAPES = [(3, 0), (0, 8), (1, 1), (5, 37), (4, 8), (3, 504), (2, 1032), (2, 1041)]


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with driver_on_cpu():
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Integers so small that their sums are exact in any order, in any of the types."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def bytes_below(n: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, n, shape, generator=generator, dtype=torch.uint8)


# ------------------------------------------------------------------------------- buckets


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(("n_buckets", "used"), [(100, 100), (1, 3), (101, 256), (256, 256)])
@pytest.mark.parametrize("weighted", [True, False])
def test_segment_sum(
    dtype: torch.dtype, rows: int, cols: int, n_buckets: int, used: int, weighted: bool
):
    values, buckets = (
        guarded(integers(rows, cols).to(dtype)),
        guarded(bytes_below(used, rows, cols)),
    )
    weight = guarded(integers(rows, cols, seed=2).to(dtype)) if weighted else None
    out = bucket_kernels.segment_sum(values, buckets, n_buckets, weight)
    assert out.dtype == torch.float32
    assert torch.equal(out, segment_sum_reference(values, buckets, n_buckets, weight))


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("cols", [2056, 1029])
def test_segment_sum_of_reals_is_near_the_exact_one_and_the_same_in_every_run(cols: int):
    values, weight, buckets = random(3, cols), random(3, cols, seed=1), bytes_below(100, 3, cols)
    out = bucket_kernels.segment_sum(values, buckets, 100, weight)
    assert torch.equal(out, bucket_kernels.segment_sum(values, buckets, 100, weight))
    exact = torch.zeros(3, 100, dtype=torch.float64)
    exact.scatter_add_(1, buckets.long(), values.double() * weight.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
def test_segment_sum_of_rows_that_are_not_aligned_and_of_other_layouts():
    values, weight, buckets = integers(24, 16), integers(24, 16, seed=2), bytes_below(7, 24, 16)
    expected = segment_sum_reference(values, buckets, 7, weight)
    shifted = torch.cat([torch.zeros(1), values.flatten()])[1:].view(24, 16)
    assert shifted.data_ptr() % 16
    assert torch.equal(segment_sum(shifted, buckets, 7, weight), expected)
    by_columns = values.T.contiguous().T
    assert torch.equal(segment_sum(by_columns, buckets, 7, weight), expected)


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "cols"), [*SHAPES, (3, 2048 + 64), (2, 2048 + 9)])
def test_mask_buckets(dtype: torch.dtype, rows: int, cols: int):
    weight, buckets = guarded(random(rows, cols).to(dtype)), guarded(bytes_below(101, rows, cols))
    first = guarded(torch.tensor([0, 50, 100, 99, 255][:rows], dtype=torch.uint8))
    out = bucket_kernels.mask_buckets(weight, buckets, first)
    assert out.dtype == dtype
    assert torch.equal(out, mask_buckets_reference(weight, buckets, first))


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
def test_the_mask_and_its_gradient_take_the_kernels(monkeypatch: pytest.MonkeyPatch):
    def not_the_reference(*_: object) -> None:
        raise AssertionError("the reference served")

    weight, buckets = integers(6, 40).bfloat16(), bytes_below(10, 6, 40)
    upstream, keep = integers(6, 40, seed=3).bfloat16(), torch.rand(6, 10, requires_grad=True)
    first = torch.tensor([4], dtype=torch.uint8).expand(6)
    expected = mask_buckets_reference(weight, buckets, first)
    gradient = segment_sum_reference(upstream, buckets, 10, weight)
    monkeypatch.setattr("besa.kernels.mask_buckets.mask_buckets_reference", not_the_reference)
    monkeypatch.setattr("besa.kernels.segment_sum.segment_sum_reference", not_the_reference)
    matrix = RateMask(keep, weight, buckets, first)()
    assert torch.equal(matrix, expected)
    matrix.backward(upstream)
    assert keep.grad is not None
    assert torch.equal(keep.grad, gradient)


def learning(device: str, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    """The errors of six steps of BESA's learning on two linears, and the rates it learns."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 48)).requires_grad_(False)
    block = block.to(device, dtype)
    linears = find_linears(block, "block", None)
    weights = [block.get_parameter(x.parameter) for x in linears]
    x = random(40, 64).to(device, dtype)
    target = block(x)
    buckets = [rank_buckets(weight.float().abs()) for weight in weights]
    learner = RateLearner(list(map(RankedMatrix, weights, buckets)), 0.5)

    def forward(_: int, weights: Sequence[WeightFactory]) -> Tensor:
        makes = {x.name: [make] for x, make in zip(linears, weights, strict=True)}
        with masked(block, linears, makes):
            return block(x)

    group = Group(len(target), range(1))
    errors = [float(learn_step(learner, forward, group, [target])[0]) for _ in range(6)]
    return errors, [rates.cpu() for rates in learner.result()]


def assert_learns_the_same(
    found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]]
) -> None:
    assert expected[0][-1] < expected[0][0]
    np.testing.assert_allclose(found[0], expected[0], rtol=0.05)
    for a, b in zip(found[1], expected[1], strict=True):
        assert float((a - b).abs().mean()) < 0.01


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_learns_the_same_by_either_way(dtype: torch.dtype):
    expected = learning("cpu", dtype)
    with driver_on_cpu():
        assert_learns_the_same(learning("cpu", dtype), expected)


@pytest.mark.usefixtures("on_cpu")
def test_types_that_the_kernels_do_not_take_go_to_torch():
    weight, buckets = integers(3, 8), bytes_below(5, 3, 8)
    assert not bucket_kernels.serves(weight.double())
    assert not bucket_kernels.serves(weight, weight.bfloat16())
    first = torch.tensor([0, 1, 2], dtype=torch.uint8)
    assert mask_buckets(weight.double(), buckets, first).dtype == torch.float64
    out = segment_sum(weight, buckets, 5, weight.bfloat16())
    assert torch.equal(out, segment_sum_reference(weight, buckets, 5, weight))


# ------------------------------------------------------------------------------- SparseGPT


def factor_of(cols: int) -> Tensor:
    x = random(4 * cols, cols, seed=5) @ (torch.eye(cols) + 0.3 * random(cols, cols, seed=6))
    return inverse_factor(x.T @ x)


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("rows", [0, 1, 16, 19])
@pytest.mark.parametrize("width", [1, 31, 33, 96, 127, 128])
def test_block_errors_with_a_given_mask(rows: int, width: int):
    factor, mask = factor_of(width), random(rows, width, seed=1) > 0
    ours, theirs = guarded(random(rows, width)), random(rows, width)
    errors = compensate_kernel.block_errors(ours, guarded(mask), factor)
    assert torch.equal(errors, block_errors_reference(theirs, mask, factor))
    assert torch.equal(ours, theirs)


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("n", "m", "width"),
    [(2, 4, 128), (4, 8, 104), (1, 4, 4), (3, 5, 125), (10, 64, 128), (20, 128, 128), (2, 48, 96)],
)
def test_block_errors_choose_n_of_m(n: int, m: int, width: int):
    rows, factor = 18, factor_of(width)
    # Ties are the rule, until the first errors are spread; columns that never fire tie at 0.
    start = integers(rows, width)
    dead = torch.zeros(width, dtype=torch.bool)
    dead[::3] = True
    masks = [torch.ones(rows, width, dtype=torch.bool) for _ in range(2)]
    ours, theirs = start.clone(), start.clone()
    errors = compensate_kernel.block_errors(ours, masks[0], factor, n, m, dead)
    assert torch.equal(errors, block_errors_reference(theirs, masks[1], factor, n, m, dead))
    assert torch.equal(ours, theirs)
    assert torch.equal(*masks)
    assert (masks[0].view(rows, -1, m).sum(2) == n).all()


@needs_compiler
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2:3"])
def test_sparsegpt_and_obs_give_the_same_by_either_way(
    pattern: str, monkeypatch: pytest.MonkeyPatch
):
    weight, x = random(20, 300), random(700, 300, seed=1)
    x[:, 7] = 0
    hessian = x.T @ x
    served: list[int] = []

    def counted(block: Tensor) -> bool:
        served.append(block.shape[1])
        return compensate_kernel.usable(block.device)

    expected, mask = sparsegpt(weight, hessian, 3000, Pattern.parse(pattern))
    updated = obs.update(weight, mask, hessian)
    monkeypatch.setattr(module.on_gpu, "serves", counted)
    with driver_on_cpu():
        found, found_mask = sparsegpt(weight, hessian, 3000, Pattern.parse(pattern))
        assert torch.equal(obs.update(weight, mask, hessian), updated)
    assert torch.equal(found_mask, mask)
    assert torch.equal(found, expected)
    assert sum(served) == 600


def test_wide_groups_go_to_torch():
    with driver_on_cpu():
        assert compensate_kernel.serves(torch.zeros(2, 128))
        assert not compensate_kernel.serves(torch.zeros(2, 129))


# ------------------------------------------------------------------------------- N of M


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (1, 8)])
@pytest.mark.parametrize(("rows", "groups"), [(0, 3), (1, 1), (3, 7), (5, 600)])
def test_n_of_m(n: int, m: int, rows: int, groups: int):
    scores = guarded(integers(rows, groups * m))  # ties are the rule
    assert torch.equal(n_of_m_kernel.n_of_m(scores, n, m), n_of_m_reference(scores, n, m))


@needs_compiler
@pytest.mark.usefixtures("on_cpu")
def test_n_of_m_of_nan_of_other_layouts_and_of_other_groups(monkeypatch: pytest.MonkeyPatch):
    scores = integers(8, 24)
    scores[scores == 3] = torch.nan
    by_columns, shifted = (
        scores.T.contiguous().T,
        torch.cat([scores.flatten()[:1], scores.flatten()]),
    )
    for one in (scores, by_columns, shifted[1:].view(8, 24)):
        assert torch.equal(n_of_m(one, 2, 4), n_of_m_reference(scores, 2, 4))
    served = []
    monkeypatch.setattr(patterns, "n_of_m_reference", lambda *given: served.append(given[2]))
    n_of_m(scores, 1, 3)
    n_of_m(scores.double(), 2, 4)
    n_of_m(scores, 2, 4)
    assert served == [3, 4]


# ------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(compiler.nvrtc() is None, reason="no NVRTC")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("source", "name"),
    [
        *(("buckets.cu", f"segment_sum<{t}, true>") for t in ("Bf16", "Fp16", "float")),
        ("buckets.cu", "segment_sum<float, false>"),
        *(("buckets.cu", f"mask_buckets<{t}, true>") for t in ("uint16_t", "uint32_t")),
        ("compensate.cu", "compensate"),
        *(("n_of_m.cu", f"n_of_m<{m}>") for m in n_of_m_kernel.GROUPS),
    ],
)
def test_compiles_without_spills(source: str, name: str, target: str):
    assert compiled(Needed(source, name), target).spilled == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", TYPES)
def test_buckets_on_a_gpu(dtype: torch.dtype):
    values, weight = integers(300, 4096).to(dtype), integers(300, 4096, seed=2).to(dtype)
    buckets, first = bytes_below(100, 300, 4096), bytes_below(101, 300)
    assert bucket_kernels.serves(values.cuda())
    out = segment_sum(values.cuda(), buckets.cuda(), 100, weight.cuda())
    assert torch.equal(out.cpu(), segment_sum_reference(values, buckets, 100, weight))
    matrix = mask_buckets(weight.cuda(), buckets.cuda(), first.cuda())
    assert torch.equal(matrix.cpu(), mask_buckets_reference(weight, buckets, first))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_learns_the_same_on_a_gpu(dtype: torch.dtype):
    assert_learns_the_same(learning("cuda", dtype), learning("cpu", dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("count", [1, 1000, 150_000, 300 * 1024])
def test_lowest_overall_and_n_of_m_on_a_gpu(count: int):
    scores = random(300, 1024).bfloat16().float()  # many are equal
    scores[5, 7] = torch.nan
    expected = lowest_pruned_overall(scores, count)
    assert torch.equal(lowest_pruned_overall(scores.cuda(), count).cpu(), expected)
    assert torch.equal(n_of_m(scores.cuda(), 2, 4).cpu(), n_of_m_reference(scores, 2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_on_a_gpu(pattern: str):
    weight, x = random(256, 512), random(2000, 512, seed=1)
    x[:, 7] = 0
    hessian = x.T @ x
    expected, mask = sparsegpt(weight, hessian, weight.numel() // 2, Pattern.parse(pattern))
    found, found_mask = sparsegpt(
        weight.cuda(), hessian.cuda(), weight.numel() // 2, Pattern.parse(pattern)
    )
    assert (found_mask.cpu() == mask).float().mean() > 0.999
    agree = (found_mask.cpu() == mask).all(1)
    np.testing.assert_allclose(found.cpu()[agree], expected[agree], rtol=1e-3, atol=1e-3)
