"""matmul.cu and matmul_multicast.cu, emulated: against float64, for launches of all kinds.

And how they compile, where there is an NVRTC.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from besa.formats import pack
from besa.kernels.cuda import compiler
from besa.kernels.cuda.call import Needed
from besa.kernels.cuda.matmul import (
    CONFIGS,
    MULTICAST_CONFIGS,
    Arrangement,
    Config,
    Plan,
    Problem,
    arrange_launch,
    arranged_bytes,
    candidates,
)
from besa.kernels.cuda.records import Records, parts, to_records
from tests.kernels.cuda.emulation import Emulated, guarded, needs_compiler
from tests.kernels.cuda.gpus import compiled

BF16, FP16 = torch.bfloat16, torch.float16
FEW_ROWS = Config(warpgroups=1, tokens=64, stages=3, blocks=5)
TWO_BLOCKS = Config(warpgroups=2, tokens=64, stages=3, blocks=2)
DEEP = Config(warpgroups=1, tokens=64, stages=4, blocks=4)
TALL = Config(warpgroups=4, tokens=64, stages=3, blocks=1)
PARTS = Config(warpgroups=2, tokens=128, stages=3, blocks=2)  # loads x in two parts
LARGE = Config(warpgroups=4, tokens=128, stages=3, blocks=1)
TWO_OF_X = Config(warpgroups=1, tokens=128, stages=3, blocks=4)  # of x two buffers, not four
AHEAD = Config(warpgroups=2, tokens=256, stages=4, blocks=1)  # locates a tile ahead
TIGHT = Config(warpgroups=1, tokens=256, stages=3, blocks=2)  # and has three buffers of x
WIDE = Config(warpgroups=2, tokens=256, stages=3, blocks=1)

# Rounding y to its type: a mean of 0.4 units of the last place.
TOLERANCE = {BF16: 3e-3, FP16: 4e-4}


def sparse(rows: int, cols: int, sparsity: float, dtype: torch.dtype) -> tuple[Tensor, Records]:
    """A weight and its records; its first four columns make sure that it is not 2:4."""
    weight = torch.randn(rows, cols)
    weight[torch.rand(rows, cols) < sparsity] = 0
    weight[0, :4] = 1
    weight = weight.to(dtype)
    return weight, to_records(*parts(pack(weight)), cols)


def arrange(x: Tensor) -> Tensor:
    """x as the kernels with `sharing` take it; NaN where there are no tokens."""
    tokens, cols = x.shape
    arranged = guarded(torch.full((arranged_bytes(cols, tokens) // 2,), torch.nan, dtype=x.dtype))
    given = guarded(x)
    problem = Arrangement(given.data_ptr(), arranged.data_ptr(), cols, tokens)
    launch = arrange_launch(cols, tokens)
    Emulated("matmul_multicast.cu", ["arrange"]).launch(
        "arrange", launch.grid, launch.threads, launch.shared, problem
    )
    return arranged


def multiply(plan: Plan, x: Tensor, records: Records, bias: Tensor | None) -> Tensor:
    """The kernel's y, the arguments where reading or writing past their ends is an error."""
    assert records.offsets is not None
    kernel = Emulated(plan.source, [plan.kernel(x.dtype)])
    y = guarded(torch.full((len(x), records.rows), torch.nan, dtype=x.dtype))
    data, offsets = guarded(records.data), guarded(records.offsets)
    given = arrange(x) if plan.sharing else guarded(x)
    added = None if bias is None else guarded(bias)
    numbers = (records.rows, records.cols, len(x), records.capacity)
    pointers = (
        data.data_ptr(),
        offsets.data_ptr(),
        given.data_ptr(),
        None if added is None else added.data_ptr(),
        y.data_ptr(),
    )
    problem = Problem(*pointers, *numbers, plan.sharing)
    launch = plan.launch(*numbers)
    kernel.launch(
        plan.kernel(x.dtype), launch.grid, launch.threads, launch.shared, problem, launch.cluster
    )
    return y


@needs_compiler
@pytest.mark.parametrize(
    ("plan", "rows", "cols", "tokens", "sparsity", "dtype", "bias"),
    [
        (Plan(TWO_BLOCKS, 1), 128, 64, 64, 0.5, BF16, False),  # one tile a warp
        (Plan(TWO_BLOCKS, 1), 128, 256, 64, 0.5, BF16, True),
        (Plan(TWO_BLOCKS, 2), 100, 320, 33, 0.5, BF16, True),  # nothing is full
        (Plan(TWO_BLOCKS, 4), 133, 448, 70, 0.3, BF16, True),  # two blocks of tokens; rows % 4
        (Plan(TWO_BLOCKS, 8), 64, 192, 40, 0.5, BF16, True),  # blocks without columns, without rows
        (Plan(TWO_BLOCKS, 1), 66, 2176, 35, 0.7, BF16, False),  # more than 32 steps
        (Plan(DEEP, 1), 130, 2240, 64, 0.5, BF16, True),
        (Plan(DEEP, 4), 70, 320, 64, 0.0, BF16, False),  # one or two steps
        (Plan(FEW_ROWS, 3), 70, 256, 5, 0.9, FP16, False),
        (Plan(FEW_ROWS, 2), 129, 128, 65, 0.0, FP16, True),  # dense: the largest records
        (Plan(TALL, 2), 270, 320, 64, 0.5, BF16, True),
        (Plan(PARTS, 2), 130, 192, 200, 0.5, BF16, True),
        (Plan(PARTS, 1), 20, 128, 257, 1.0, BF16, True),  # all but empty
        (Plan(PARTS, 3), 140, 2176, 100, 0.7, FP16, False),
        (Plan(LARGE, 2), 300, 448, 128, 0.5, BF16, True),
        (Plan(TWO_BLOCKS, 1, 1), 128, 64, 64, 0.5, BF16, False),
        (Plan(TWO_BLOCKS, 1, 1), 100, 2176, 33, 0.5, BF16, True),
        (Plan(TWO_BLOCKS, 2, 2), 300, 576, 70, 0.3, BF16, True),  # one shares x and has no rows
        (Plan(TWO_OF_X, 2, 4), 133, 320, 130, 0.0, BF16, False),
        (Plan(TWO_OF_X, 1, 8), 250, 320, 64, 0.9, FP16, True),
        (Plan(TWO_OF_X, 3, 1), 250, 576, 128, 0.5, BF16, True),
        (Plan(PARTS, 2, 2), 130, 384, 150, 0.5, BF16, False),
        (Plan(LARGE, 2, 4), 300, 576, 128, 0.5, BF16, True),
        (Plan(AHEAD, 1, 2), 140, 2176, 200, 0.5, BF16, True),
        (Plan(AHEAD, 3, 1), 140, 384, 192, 0.5, BF16, True),
        (Plan(TIGHT, 2, 2), 140, 640, 256, 0.5, BF16, True),
        (Plan(WIDE, 2, 4), 140, 576, 300, 0.5, BF16, True),
        (Plan(WIDE, 4, 2), 64, 192, 256, 0.5, BF16, True),  # blocks without columns
    ],
)
def test_product(
    plan: Plan, rows: int, cols: int, tokens: int, sparsity: float, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(rows)
    weight, records = sparse(rows, cols, sparsity, dtype)
    x = torch.randn(tokens, cols).to(dtype)
    added = torch.randn(rows).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    y = multiply(plan, x, records, added)
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE[dtype]
    # The error of one place can't hide behind the others: no partial sum is far from its result.
    assert (y.double() - expected).abs().max() < 0.02 * expected.abs().max()


@needs_compiler
@pytest.mark.parametrize(
    "plan", [Plan(TWO_BLOCKS, 1), Plan(PARTS, 3), Plan(TWO_OF_X, 3, 2), Plan(AHEAD, 1, 2)]
)
def test_exact(plan: Plan) -> None:
    """Whole numbers have exact sums, so that any weight in a wrong place shows."""
    torch.manual_seed(0)
    weight = torch.randint(-4, 5, (144, 448)).float()
    weight[torch.rand(144, 448) < 0.5] = 0
    records = to_records(*parts(pack(weight.to(BF16))), 448)
    x = torch.randint(-1, 2, (66, 448)).float()
    y = multiply(plan, x.to(BF16), records, None)
    assert torch.equal(y, (x @ weight.T).to(BF16))


@needs_compiler
@pytest.mark.parametrize("plan", [Plan(TWO_BLOCKS, 1), Plan(TWO_BLOCKS, 1, 2)])
def test_infinite_token_stays_alone(plan: Plan) -> None:
    _, records = sparse(64, 128, 0.5, BF16)
    x = torch.randn(40, 128).to(BF16)
    clean = multiply(plan, x, records, None)
    x[7, 3] = torch.inf
    y = multiply(plan, x, records, None)
    others = torch.arange(40) != 7
    assert torch.equal(y[others], clean[others])
    assert not y[7].isfinite().any()  # infinity, or infinity times a zero of the weight


def test_launch() -> None:
    launch = Plan(TWO_BLOCKS, 4).launch(rows=4096, cols=4096, tokens=65, capacity=1344)
    assert launch.grid == (4, 2, 32)
    assert (launch.threads, launch.cluster) == (256, 4)
    assert launch.shared == 1024 + 2 * 64 * 128 + 8 * 3 * 1344 + 16
    launch = Plan(WIDE, 2, 4).launch(rows=4097, cols=4096, tokens=512, capacity=1344)
    assert (launch.grid, launch.cluster) == ((8, 2, 9), 8)
    with pytest.raises(AssertionError, match="whole tiles"):
        Plan(TWO_BLOCKS, 1).launch(rows=64, cols=100, tokens=1, capacity=1344)


@pytest.mark.parametrize("tokens", [33, 64, 128, 200, 256, 512])
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (4096, 4096), (11008, 4096), (8192, 28672)])
@pytest.mark.parametrize("capacity", [528, 1344, 2176])
def test_candidates_fit(rows: int, cols: int, tokens: int, capacity: int) -> None:
    found = list(candidates(rows, cols, tokens, capacity))
    assert found
    assert len(set(found)) == len(found)
    for plan in found:
        assert plan.fits(capacity)
        assert plan.splits <= cols // 64
        assert plan.launch(rows, cols, tokens, capacity).shared <= 227 * 1024


@pytest.mark.skipif(compiler.nvrtc() is None, reason="no NVRTC")
@pytest.mark.parametrize(
    "plan",
    [
        *(Plan(config, 1) for config in CONFIGS),
        *(Plan(config, 1, 2) for config in MULTICAST_CONFIGS),
    ],
    ids=lambda plan: f"{plan.source}-{plan.kernel(BF16)}",
)
def test_compiles_without_spills(plan: Plan) -> None:
    nvrtc = compiler.nvrtc()
    assert nvrtc is not None
    if 90 not in nvrtc.architectures:
        pytest.skip("an NVRTC that knows no sm_90")
    cubin = compiled(Needed(plan.source, plan.kernel(BF16), specific=True), "sm_90")
    assert cubin.spilled == 0
    assert cubin.registers * 128 * plan.config.warpgroups * plan.config.blocks <= 65536
    assert "serialized" not in cubin.log  # products that wait for each other
