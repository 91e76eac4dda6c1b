"""How the products of many tokens are launched: matmul.cu, matmul_multicast.cu, on capability 9.0.

>>> plan = Plan(Config(warpgroups=2, tokens=64, stages=3, blocks=2), splits=8)
>>> plan.source, plan.kernel(torch.bfloat16)
('matmul.cu', 'matmul<Bf16, 2, 64, 3, 2>')
>>> launch = plan.launch(rows=4096, cols=4096, tokens=64, capacity=1344)
>>> launch.grid, launch.threads, launch.shared, launch.cluster
((8, 1, 32), 256, 57872, 8)

`candidates` has the plans that are worth measuring, best guess first; `Matmul` launches one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_int, c_void_p
from dataclasses import dataclass

import torch

from besa.kernels.cuda import driver
from besa.kernels.cuda.call import TYPES, Call, Needed, Shape, at

# wgmma exists there and nowhere else: kernels are compiled for sm_90a (the driver's `specific`).
CAPABILITY = (9, 0)

# Shared memory of a block and of a multiprocessor, which takes 1 KB more for each block.
MOST_SHARED, ALL_SHARED = 227 * 1024, 228 * 1024
MOST_CLUSTER = 8  # more is not portable

_ROW_BYTES = 128  # of a tile of x
_SLACK = 16
_BARRIERS = 64  # bytes, matmul_multicast.cu


class Problem(ctypes.Structure):
    """The argument of both kernels, which call the last field `early` and `sharing`.

    `x` is what `arrange` wrote for matmul_multicast.cu. `early`, 0 or 1, says when the next kernel
    may begin: at once is better where a launch leaves room on every multiprocessor.
    """

    _fields_ = [
        ("records", c_void_p),
        ("offsets", c_void_p),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_int),
        ("cols", c_int),
        ("tokens", c_int),
        ("capacity", c_int),
        ("early_or_sharing", c_int),
    ]


class Arrangement(ctypes.Structure):
    """The argument of matmul_multicast.cu's `arrange`."""

    _fields_ = [
        ("x", c_void_p),
        ("arranged", c_void_p),
        ("cols", c_int),
        ("tokens", c_int),
    ]


@dataclass(frozen=True)
class Launch:
    """What the driver's `launch` takes."""

    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: int


def arranged_bytes(cols: int, tokens: int) -> int:
    """What `arrange` writes: whole blocks of 64 tokens."""
    return -(-tokens // 64) * 64 * cols * 2


def arrange_launch(cols: int, tokens: int) -> Launch:
    """The launch of `arrange`."""
    return Launch((cols // 64, -(-tokens // 32), 1), threads=256, shared=0, cluster=1)


@dataclass(frozen=True)
class Config:
    """An instance of a kernel.

    Attributes:
        warpgroups: of a block, 64 rows each.
        tokens: of a block, a multiple of 64.
        stages: records of a warp that are under way or in use.
        blocks: that shall fit a multiprocessor, which limits the registers.
    """

    warpgroups: int
    tokens: int
    stages: int
    blocks: int

    @property
    def rows(self) -> int:
        """Of a block."""
        return 64 * self.warpgroups


@dataclass(frozen=True)
class Plan:
    """A way to compute a product.

    Attributes:
        config: the instance.
        splits: blocks of a cluster that share the columns of W.
        sharing: blocks of a cluster that share x, in matmul_multicast.cu; 0 for matmul.cu.
    """

    config: Config
    splits: int
    sharing: int = 0

    @property
    def source(self) -> str:
        """The kernel's file."""
        return "matmul_multicast.cu" if self.sharing else "matmul.cu"

    def kernel(self, dtype: torch.dtype) -> str:
        """The instance for x, y and values of this type."""
        c = self.config
        return f"matmul<{TYPES[dtype]}, {c.warpgroups}, {c.tokens}, {c.stages}, {c.blocks}>"

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits * max(1, self.sharing)

    def shared(self, capacity: int) -> int:
        """Bytes of shared memory of a block: x and the records, or the sums in their place."""
        c = self.config
        before = 1024 + (_BARRIERS if self.sharing else 0)
        buffers = 4 if self.sharing and c.tokens * c.blocks <= 256 else 3
        x = buffers * c.tokens * _ROW_BYTES
        inputs = x + 4 * c.warpgroups * c.stages * capacity + _SLACK
        return before + max(inputs, c.tokens * (c.rows + 4) * 4)

    def fits(self, capacity: int) -> bool:
        """Whether a multiprocessor has the shared memory for `blocks` of them."""
        shared, blocks = self.shared(capacity), self.config.blocks
        return shared <= MOST_SHARED and blocks * (shared + 1024) <= ALL_SHARED

    def launch(self, rows: int, cols: int, tokens: int, capacity: int) -> Launch:
        """The launch for a weight [rows, cols]; `capacity` are the bytes of its largest record."""
        assert cols % 64 == 0, "records have whole tiles"
        assert 1 <= self.cluster <= MOST_CLUSTER, "larger clusters are not portable"
        groups = -(-rows // (self.config.rows * max(1, self.sharing)))
        grid = (self.cluster, -(-tokens // self.config.tokens), groups)
        return Launch(grid, 128 * self.config.warpgroups, self.shared(capacity), self.cluster)


# Without spills and without products that wait for each other (ptxas's warnings C7510 to C7514): 64
# tokens take 32 sums a thread, 128 take 64, 256 take 128, and all else about 95 registers.
CONFIGS = (
    Config(2, 64, 4, 1),
    Config(2, 64, 3, 2),
    Config(1, 64, 3, 4),
    Config(4, 64, 3, 1),
    Config(2, 128, 4, 1),
    Config(1, 128, 4, 2),
    Config(2, 192, 4, 1),
    Config(2, 256, 3, 1),
)
MULTICAST_CONFIGS = (
    Config(1, 128, 4, 2),
    Config(2, 128, 4, 1),
    Config(2, 192, 4, 1),
    Config(1, 256, 4, 1),
    Config(1, 256, 3, 2),
    Config(2, 256, 4, 1),
    Config(2, 256, 3, 1),  # for records of more than 1.5 KB
)

# Multiprocessors of an H100's or H200's clusters (GPCs): blocks of a cluster have to be in one.
_GPCS = (16, 16, 16, 16, 16, 16, 18, 18)


def estimate(plan: Plan, rows: int, cols: int, tokens: int, capacity: int) -> float:
    """Cycles that a product should take: a multiprocessor's work, as if all else were hidden.

    The figures are of the instructions in the machine code and of an H100: passes of shared
    memory, tensor cores, 26 bytes a cycle from L2 and 12 from other blocks, and the way of a tile
    from its mask to the product.
    """
    c = plan.config
    grid = plan.launch(rows, cols, tokens, capacity).grid
    # A multiprocessor's blocks take as long together as one after another, but for their gaps.
    room = sum(gpc * c.blocks // plan.cluster for gpc in _GPCS) * plan.cluster / c.blocks
    rounds = math.ceil(grid[0] * grid[1] * grid[2] / room)
    warps = 4 * c.warpgroups
    x_passes = c.tokens / warps * (1 if plan.sharing else 2)
    passes = 57 + c.tokens / 4 + x_passes  # decoding a tile, wgmma's reading of x, writing x
    record = 0.87 * capacity
    from_l2 = (warps * record + c.tokens * _ROW_BYTES / max(1, plan.sharing)) / 26
    # With more registers for each thread, two tiles are on their way.
    alone = 650 if c.warpgroups * c.blocks <= 2 else 850
    step = max(warps * max(passes, c.tokens / 2), from_l2, alone / min(c.blocks, rounds))
    sums = 4 * c.tokens * c.rows
    ending = sums / 100 + sums * (plan.splits - 1) / plan.splits / 12
    beginning = 3500 + (3500 if plan.sharing else 0)
    return rounds * (math.ceil(cols // 64 / plan.splits) * step + ending) + beginning


def candidates(rows: int, cols: int, tokens: int, capacity: int) -> Iterator[Plan]:
    """Plans to measure, the one that should take the least time first."""
    plans = [Plan(config, splits) for config in CONFIGS for splits in range(1, MOST_CLUSTER + 1)]
    plans += [
        Plan(config, splits, sharing)
        for config in MULTICAST_CONFIGS
        for sharing in (2, 4)
        for splits in range(1, MOST_CLUSTER // sharing + 1)
    ]
    fitting = [
        plan
        for plan in plans
        if plan.fits(capacity)
        and plan.splits <= cols // 64
        # Less than half of the sums would be for something.
        and not (plan.config.tokens > 64 and plan.config.tokens >= 2 * tokens)
    ]
    # Fewer stages or buffers are for the places where more do not fit.
    most: dict[tuple[int, int, int], int] = {}
    for plan in fitting:
        c, key = plan.config, (plan.config.warpgroups, plan.config.tokens, plan.config.blocks)
        most[key] = max(most.get(key, 0), c.stages)
    fitting = [
        plan
        for plan in fitting
        if plan.config.stages
        == most[plan.config.warpgroups, plan.config.tokens, plan.config.blocks]
    ]
    fitting.sort(key=lambda plan: estimate(plan, rows, cols, tokens, capacity))
    yield from fitting


@dataclass(frozen=True)
class Matmul:
    """A product by a plan, of weights of 16-bit values without a pattern.

    Attributes:
        plan: how it is launched.
        early: whether the next kernel may begin at once, for `Plan`s without sharing.
    """

    plan: Plan
    early: bool = False

    def __str__(self) -> str:
        plan, config = self.plan, self.plan.config
        shared = f", x shared by {plan.sharing}" if plan.sharing else ""
        return (
            f"records, wgmma, {config.rows} x {config.tokens}, {config.stages} stages, columns in "
            f"{plan.splits}{shared}"
        )

    def kernels(self, shape: Shape, tokens: int) -> list[Needed] | None:
        """What it launches; None if it cannot."""
        if shape.two_four or shape.values != shape.x or not self.plan.fits(shape.capacity):
            return None
        if self.plan.splits > shape.cols // 64 or tokens <= 8:
            return None
        found = [Needed(self.plan.source, self.plan.kernel(shape.x), specific=True)]
        if self.plan.sharing:
            found.append(Needed("matmul_multicast.cu", "arrange", specific=True))
        return found

    def run(self, call: Call) -> None:
        """Queues the product."""
        shape, tokens, device = call.shape, call.tokens, call.x.device
        x = call.x
        if self.plan.sharing:
            size = arranged_bytes(shape.cols, tokens) // x.element_size()
            arranged = torch.empty(size, dtype=x.dtype, device=device)
            launch = arrange_launch(shape.cols, tokens)
            driver.kernel("matmul_multicast.cu", "arrange", device, specific=True).launch(
                launch.grid,
                launch.threads,
                launch.shared,
                Arrangement(x.data_ptr(), arranged.data_ptr(), shape.cols, tokens),
                call.stream,
                early=True,
            )
            x = arranged
        launch = self.plan.launch(shape.rows, shape.cols, tokens, shape.capacity)
        problem = Problem(
            call.records.data_ptr(),
            at(call.offsets),
            x.data_ptr(),
            at(call.bias),
            call.y.data_ptr(),
            shape.rows,
            shape.cols,
            tokens,
            shape.capacity,
            self.plan.sharing or int(self.early),
        )
        driver.kernel(self.plan.source, self.plan.kernel(shape.x), device, specific=True).launch(
            launch.grid,
            launch.threads,
            launch.shared,
            problem,
            call.stream,
            early=True,
            cluster=launch.cluster,
        )
