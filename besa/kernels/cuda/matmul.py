"""How the products of many tokens are launched: matmul.cu, matmul_multicast.cu, on capability 9.0.

>>> plan = Plan(Config(warpgroups=2, tokens=64, stages=3, blocks=2), splits=8)
>>> plan.source, plan.kernel(torch.bfloat16)
('matmul.cu', 'matmul<Bf16, 2, 64, 3, 2>')
>>> launch = plan.launch(rows=4096, cols=4096, tokens=64, capacity=1344)
>>> launch.grid, launch.threads, launch.shared, launch.cluster
((8, 1, 32), 256, 49680, 8)

`candidates` has the plans that are worth measuring, best guess first; `Matmul` launches one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_int, c_void_p
from dataclasses import dataclass, replace

import torch

from besa.kernels.cuda import driver
from besa.kernels.cuda.call import TYPES, Call, Needed, Shape

# wgmma exists there and nowhere else: kernels are compiled for sm_90a (the driver's `specific`).
CAPABILITY = (9, 0)

# Shared memory of a block and of a multiprocessor, which takes 1 KB more for each block.
MOST_SHARED, ALL_SHARED = 227 * 1024, 228 * 1024
MOST_CLUSTER = 8  # more is not portable

_ROW_BYTES = 128  # of a tile of x
_SLACK = 16
_BARRIERS = 64  # bytes, matmul_multicast.cu


class Problem(ctypes.Structure):
    """The argument of both kernels; `x` is what `arrange` wrote for matmul_multicast.cu."""

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
        ("sharing", c_int),
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
        buffers = 2
        if self.sharing:  # as in the kernel
            buffers = 4 if c.tokens * c.blocks <= 256 else 3 if c.tokens > 128 else 2
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
# tokens take 32 sums a thread, 128 take 64, 256 take 128, and all else from 50 registers on.
CONFIGS = (
    Config(2, 64, 3, 3),
    Config(2, 64, 3, 2),
    Config(1, 64, 3, 5),
    Config(1, 64, 4, 4),
    Config(4, 64, 3, 1),
    Config(2, 128, 3, 2),
    Config(1, 128, 3, 3),
    Config(4, 128, 3, 1),
)
MULTICAST_CONFIGS = (
    Config(1, 128, 3, 4),
    Config(2, 128, 3, 2),
    Config(4, 128, 3, 1),
    Config(1, 256, 3, 2),
    Config(2, 256, 4, 1),
    Config(2, 256, 3, 1),  # for records of more than 1.5 KB
)

# Multiprocessors of an H100's GPCs: the blocks of a cluster have to be in one. They differ from GPU
# to GPU. These explain what was measured on one, where 32 clusters of 4 did not fit side by side.
_GPCS = (18, 18, 18, 18, 16, 16, 16, 12)


def estimate(plan: Plan, rows: int, cols: int, tokens: int, capacity: int) -> float:
    """Cycles that a product should take.

    A multiprocessor's work for a tile is passes of shared memory, and what is not hidden by other
    blocks. A few warps wait, instead, for the way of a tile from its mask to the product.

    This form, fitted to 480 times of an H100, had a rank correlation of 0.87 with them on average
    over the products (shape and tokens), and its first plan took 1.04 of the best one's time. The
    kernels had 8 to 16 warps of a multiprocessor then; `filling` and `alone` are reckoned anew.
    """
    c = plan.config
    grid = plan.launch(rows, cols, tokens, capacity).grid
    clusters, size = grid[0] * grid[1] * grid[2] // plan.cluster, plan.cluster
    room = c.blocks * (sum(_GPCS) if size == 1 else sum(gpc // size for gpc in _GPCS))
    rounds = math.ceil(clusters / room)
    # In the last round a multiprocessor may have fewer blocks. Clusters do not lie evenly: what
    # just fits is as likely not to.
    left = (clusters - (rounds - 1) * room) * size / sum(_GPCS)
    uneven = 1.0 if size == 1 else 1.1
    last = min(c.blocks, (math.ceil(left) + math.ceil(uneven * left)) / 2)
    warps = 4 * c.warpgroups
    decoding = 40 + 0.0246 * capacity  # passes: fewer bank conflicts of fewer values
    passes = decoding + c.tokens / 4 + c.tokens / (warps if plan.sharing else warps / 2)
    alone = 950 + c.tokens * (1.4 if plan.sharing else 2.0)
    from_l2 = (warps * 0.87 * capacity + c.tokens * _ROW_BYTES / max(1, plan.sharing)) / 26
    steps = math.ceil(cols // 64 / plan.splits)
    sums = 4 * c.tokens * c.rows
    ending = sums / 100 + sums * (plan.splits - 1) / plan.splits / 12

    def span(blocks: float) -> float:
        # Warps that meet at every tile do the same at the same time, but for other blocks.
        filling = 1.25 if plan.sharing else 1.05 + 0.34 / blocks
        busy = blocks * warps * max(filling * passes, c.tokens / 2)
        step = max(busy, alone + 0.2 * busy) + 0.15 * blocks * from_l2
        return steps * step + blocks * ending

    beginning = 5000 + (5000 if plan.sharing else 0)
    return (rounds - 1) * span(c.blocks) + span(last) + beginning


def candidates(rows: int, cols: int, tokens: int, capacity: int) -> Iterator[Plan]:
    """Plans to measure, the one that should take the least time first."""
    plans = [Plan(config, splits) for config in CONFIGS for splits in range(1, MOST_CLUSTER + 1)]
    plans += [
        Plan(config, splits, sharing)
        for config in MULTICAST_CONFIGS
        for sharing in (1, 2, 4)
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
    most: dict[Config, int] = {}
    for plan in fitting:
        size = replace(plan.config, stages=0)
        most[size] = max(most.get(size, 0), plan.config.stages)
    fitting = [
        plan for plan in fitting if plan.config.stages == most[replace(plan.config, stages=0)]
    ]
    fitting.sort(key=lambda plan: estimate(plan, rows, cols, tokens, capacity))
    seen = set()
    for plan in fitting:  # of plans that differ in the sharing of x, the best
        key = (plan.config, plan.splits, plan.sharing > 0)
        if key not in seen:
            yield plan
        seen.add(key)


@dataclass(frozen=True)
class Matmul:
    """A product by a plan, of weights of 16-bit values without a pattern."""

    plan: Plan

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
            driver.at(call.offsets),
            x.data_ptr(),
            driver.at(call.bias),
            call.y.data_ptr(),
            shape.rows,
            shape.cols,
            tokens,
            shape.capacity,
            self.plan.sharing,
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
