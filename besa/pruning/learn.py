"""The loop by which a block's masks and weights are learned, towards the dense block's output.

BESA's objective (arXiv 2402.16880, equation 2): the squared error of the block's output over that
of the dense block, plus what the learner adds to it. What is learned is the learner's own:
`besa.pruning.allocate` learns how sparse each row is, `besa.pruning.nm` which N of every M
neighbours stay, `besa.pruning.kept_weights` what the kept weights are. The first two give masked
weights with straight-through gradients to their parameters, and the examples of all three show the
loop at work.

A step may see several batches, of several processes: their errors are parts of the step's error, so
that a step is the same however it is cut up.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from besa.processes.ranks import ALONE, Ranks
from besa.pruning.batches import Group, single
from besa.pruning.masked import WeightFactory

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# The learners do not mind the loss's scale; float16 gradients would vanish without one.
LOSS_SCALE = 2.0**16

# How wrong an output is against its target, a scalar, where the mean square of all targets that are
# judged together is given.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# The block's output for batch i with masked weights, one factory for each matrix.
Forward = Callable[[int, Sequence[WeightFactory]], Tensor]


def mean_square(target: Tensor) -> Tensor:
    """The mean of the squares in float32, a scalar."""
    return target.float().square().mean()


def relative_error(output: Tensor, target: Tensor, square: Tensor | None = None) -> Tensor:
    """||output - target||^2 / ||target||^2 in float32, a scalar on the output's device.

    Args:
        square: the mean square of all targets that this one is a part of; None: it stands alone.
    """
    output, target = output.float(), target.to(output.device).float()
    square = mean_square(target) if square is None else square
    return (output - target).square().mean() / square


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of ||output - target||^2 / ||target||^2, as `relative_error`.

    A token of a large state counts like any other: Gemma's `<bos>` has 5 to 25 times the norm of
    those that follow, and is most of the other measure.
    """
    output, target = output.float(), target.to(output.device).float()
    wrong, right = (output - target).square().mean(-1), target.square().mean(-1)
    return (wrong / right.clamp_min(torch.finfo(torch.float32).tiny)).mean()


def balanced_error(output: Tensor, target: Tensor, square: Tensor | None = None) -> Tensor:
    """Half `relative_error`, half `token_error`.

    What most tokens are matters, and so does what a few large ones are: all others attend to them.
    """
    return (relative_error(output, target, square) + token_error(output, target)) / 2


@dataclass(frozen=True)
class Proposal:
    """The masked weights that a learner's parameters stand for.

    Attributes:
        weights: what makes each of them, so that none need exist longer than it is used.
        rate: the fraction of weights that they prune, a scalar.
        penalty: what joins the error in the loss, a scalar.
    """

    weights: Sequence[WeightFactory]
    rate: Tensor | float
    penalty: Tensor | float = 0.0


class Learner(Protocol[T_co]):
    """Parameters, how they make masks, and how they move."""

    def parameters(self) -> Sequence[Tensor]:
        """What takes the gradients, in the same order in every process."""

    def propose(self) -> Proposal:
        """The masked weights of the parameters as they are, differentiable."""

    def update(self, size: float) -> None:
        """Moves the parameters against their gradients and forgets these.

        Args:
            size: of the step, as a share of the first step's.
        """

    def result(self) -> T_co:
        """What was learned."""


@dataclass(frozen=True)
class Step:
    """A finished step of learning: its error, and the fraction of weights that it pruned."""

    done: int
    total: int
    loss: float
    rate: float


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Learned(Generic[T]):
    """A learner's result, and the mean error of each epoch."""

    value: T
    losses: list[float]


def learn(
    learner: Learner[T],
    forward: Forward,
    targets: Sequence[Tensor],
    *,
    steps: Sequence[Group] | None = None,
    loss: Loss = relative_error,
    epochs: int = 1,
    generator: torch.Generator,
    on_step: OnStep = lambda step: None,
    on_order: Callable[[list[int]], None] = lambda order: None,
    ranks: Ranks = ALONE,
) -> Learned[T]:
    """Learns for some epochs, with steps that shrink to nothing along a cosine.

    Args:
        targets: the dense block's outputs, one tensor a batch.
        steps: the batches that each step sees; None: one batch a step.
        loss: of an output.
        generator: orders the steps; every process has the same.
        on_step: is told of every step; on a GPU, once the step after it is queued.
        on_order: is told the order of an epoch's batches before the first of them.
        ranks: the processes that share each step.
    """
    groups = single([len(x) for x in targets]).steps if steps is None else steps
    total = epochs * len(groups)
    losses: list[float] = []
    unread: deque[_Figures] = deque()

    def report(but: int) -> None:
        """Reads the figures of all steps but the last ones."""
        while len(unread) > but:
            loss, rate = unread.popleft().read()
            losses.append(loss)
            on_step(Step(len(losses), total, loss, rate))

    for epoch in range(epochs):
        order = torch.randperm(len(groups), generator=generator).tolist()
        on_order([i for number in order for i in groups[number].batches])
        for done, number in enumerate(order, start=epoch * len(groups)):
            size = (1 + math.cos(math.pi * done / total)) / 2
            figures = learn_step(learner, forward, groups[number], targets, size, loss, ranks)
            unread.append(_Figures(*figures))
            report(but=1 if unread[-1].on_gpu else 0)
    report(but=0)
    return Learned(learner.result(), torch.tensor(losses).view(epochs, -1).mean(1).tolist())


class _Figures:
    """A step's error and rate, on their way from the device.

    Read at once, they make the host wait for the step, and a GPU then for the host to queue the
    next one. Read when that is queued, they cost nothing.
    """

    def __init__(self, error: Tensor, rate: Tensor) -> None:
        self.on_gpu = error.is_cuda
        self._values = torch.stack([error, rate]).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if self.on_gpu else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(error.device))

    def read(self) -> tuple[float, float]:
        """The figures; waits for their step, but for none after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        error, rate = self._values.tolist()
        return error, rate


def learn_step(
    learner: Learner[object],
    forward: Forward,
    group: Group,
    targets: Sequence[Tensor],
    size: float = 1.0,
    loss: Loss = relative_error,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """One step on a group of batches, of which this process may have some or none.

    Returns:
        The error before the step and the rate, scalars on the device, the same in every process.
    """
    device = learner.parameters()[0].device
    own = [targets[i].to(device) for i in group.batches]
    square = group_square(group, own, device, ranks)
    error = torch.zeros((), device=device)
    with torch.enable_grad():
        proposal = learner.propose()
        penalty = proposal.penalty if ranks.leads else 0.0  # which is to count once
        for left, i, target in zip(reversed(range(len(own))), group.batches, own, strict=True):
            part = loss(forward(i, proposal.weights), target, square) * (
                len(target) / group.windows
            )
            error += part.detach()
            joined = part if left else part + penalty
            (joined * LOSS_SCALE).backward(retain_graph=left > 0)
        if not own and isinstance(penalty, Tensor):
            (penalty * LOSS_SCALE).backward()
    ranks.sum_gradients(learner.parameters())
    ranks.sum_(error)
    learner.update(size)
    rate = proposal.rate
    rate = rate.detach() if isinstance(rate, Tensor) else error.new_full((), rate)
    return error, rate


def group_square(
    group: Group, own: Sequence[Tensor], device: torch.device, ranks: Ranks = ALONE
) -> Tensor:
    """The mean square of a group's targets over all processes, float32 [] on the device.

    Args:
        own: the targets of this process's batches.
    """
    square = torch.zeros((), device=device)
    for target in own:
        square += mean_square(target) * (len(target) / group.windows)
    ranks.sum_(square)
    return square
