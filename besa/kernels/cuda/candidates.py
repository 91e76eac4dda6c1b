"""The ways that may be the fastest for a shape of weight, for `tuning.py` to time.

Which is best depends on how evenly thread blocks fill the GPU, so that guesses are good enough to
leave most ways out: `_occupancy` here, and `besa.kernels.cuda.matmul.estimate`.

>>> shape = Shape(4096, 4096, torch.bfloat16, torch.bfloat16, False, 1280, 0, False)
>>> print(candidates(shape, 1, Gpu(multiprocessors=132, capability=(9, 0)))[0])
records, 1 x 16 rows, 16 warps, 2 stages
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch

from besa.kernels.cuda import matmul
from besa.kernels.cuda.call import Shape, Way
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.matmul import Matmul
from besa.kernels.cuda.multiply import MOST_TOKENS, Multiply

# How many sizes of the kernel of few tokens are timed, by its row blocks, up to so many tokens:
# those that should fill the GPU best, without clusters and with. With more row blocks a warp has
# more to do at a time, and x is read less often.
_QUOTAS = (
    (8, {1: (3, 2), 2: (3, 2)}),
    (32, {1: (1, 1), 2: (2, 1), 4: (3, 1)}),
    (MOST_TOKENS, {2: (2, 1), 4: (2, 3)}),
)
_STAGES = (2, 3)
_SPLITS = (1, 2, 3, 4, 6, 8)
_REGISTERS = 65536  # of a multiprocessor
_SPLIT_COST = 0.1  # of the time, for the sums of a cluster

# Plans of the kernel of many tokens that are timed, from as many tokens on and to as many.
_PLANS, _PLANS_FROM, _PLANS_TO = 12, 17, 1024


@dataclass(frozen=True)
class Gpu:
    """What candidates depend on of a GPU.

    Attributes:
        shared: bytes of shared memory of a multiprocessor.
    """

    multiprocessors: int
    capability: tuple[int, int]
    shared: int = 228 * 1024  # of an H100; an A100 has 164 KiB, an RTX 4090 100

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """That of a device."""
        properties = torch.cuda.get_device_properties(device)
        return cls(
            properties.multi_processor_count,
            (properties.major, properties.minor),
            # Not every version of torch says.
            getattr(properties, "shared_memory_per_multiprocessor", cls.shared),
        )


def candidates(shape: Shape, tokens: int, gpu: Gpu) -> list[Way]:
    """The ways to time, the one that should be the fastest first."""
    ways: list[Way] = []
    if gpu.capability == matmul.CAPABILITY and _PLANS_FROM <= tokens <= _PLANS_TO:
        plans = matmul.candidates(shape.rows, shape.cols, tokens, shape.capacity)
        ways += [Matmul(plan) for plan in islice(plans, _PLANS)]
    if tokens <= MOST_TOKENS:
        for blocks, counts in next(quota for most, quota in _QUOTAS if tokens <= most).items():
            for splits, count in zip((_SPLITS[:1], _SPLITS[1:]), counts, strict=True):
                if len(splits) == 1 or gpu.capability >= (9, 0):
                    ways += _best(blocks, splits, count, shape, tokens, gpu)
    if tokens > 16:
        ways += [Expand(), Expand(int8=True)]
    fitting = [way for way in ways if way.kernels(shape, tokens) is not None]
    return fitting or [Expand()]


def _best(
    blocks: int, splits: tuple[int, ...], count: int, shape: Shape, tokens: int, gpu: Gpu
) -> list[Way]:
    """The sizes that fill the GPU best, one for each number of thread blocks and clusters."""
    best: dict[tuple[int, int], tuple[float, int, int, int]] = {}
    for warps, resident in _sizes(blocks, tokens):
        for split in splits:
            occupancy = _occupancy(blocks, warps, resident, split, shape, gpu.multiprocessors)
            size = (occupancy, -warps, resident, split)
            best[resident, split] = max(best.get((resident, split), size), size)
    ways = [
        Multiply(blocks, -minus_warps, stages, resident, split)
        for _, minus_warps, resident, split in sorted(best.values(), reverse=True)[:count]
        for stages in _STAGES
    ]
    # A kibibyte of each thread block is the system's.
    return [way for way in ways if way.resident * (way.shared(shape, tokens) + 1024) <= gpu.shared]


def _sizes(blocks: int, tokens: int) -> list[tuple[int, int]]:
    """(warps, thread blocks of a multiprocessor) for which the registers suffice."""
    eights = -(-tokens // 8)
    # What the compiler likes to have; with 15% fewer, products are hardly slower.
    registers = 0.85 * min(255, 43 + 8 * eights + (8 + 5 * eights) * blocks)

    def suffice(warps: int, resident: int) -> bool:
        fours = -(-warps * resident // 4)  # the compiler counts on four warps at a time
        return registers <= _REGISTERS // (128 * fours) // 8 * 8 and fours <= 8

    return [
        (warps, resident)
        for resident in range(1, 9)
        for warps in range(4, 17)
        if suffice(warps, resident)
        and not suffice(warps, resident + 1)  # with room for one more, more would be better
    ]


def _occupancy(
    blocks: int, warps: int, resident: int, splits: int, shape: Shape, multiprocessors: int
) -> float:
    """How much of the time how many of 32 warps are at work, from 0 to 1.

    Thread blocks are as long as each other: the GPU is done when its fullest multiprocessor is, and
    a thread block when the warp with most tiles is.
    """
    grid, tiles = -(-shape.rows // (16 * blocks)) * splits, shape.cols // 64
    beside = min(resident, -(-grid // multiprocessors))
    rounds = -(-grid // (multiprocessors * beside))
    together = warps * splits
    evenness = (
        grid / (multiprocessors * beside * rounds) * tiles / (together * -(-tiles // together))
    )
    cost = _SPLIT_COST if splits > 1 else 0.0
    return evenness * min(1.0, warps * beside / 32) * (1 - cost)
