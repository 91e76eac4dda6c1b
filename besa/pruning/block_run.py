"""One decoder block on the calibration stream: what a method sees of it, and what it can do to it.

>>> from besa.model.blocks import find_linears
>>> from besa.pruning.budget import Budget
>>> from besa.pruning.methods import load
>>> from besa.pruning.batches import single
>>> block, targets = nn.Sequential(nn.Linear(16, 8)), []
>>> run = BlockRun(
...     stored=block,
...     linears=find_linears(block, "block", experts=None),
...     calls=[Call((), {})],
...     stream=[torch.randn(1, 4, 16)],
...     targets=targets,
...     groups=single([1]),
...     device=torch.device("cpu"),
...     dtype=torch.float32,
...     config=PruneConfig(out="pruned"),
... )
>>> run.observe(hessians=False, on_output=lambda i, output: targets.append(output))
>>> run.put(load("wanda").mask(run, Budget(zeros=64, rate=0.5)))
>>> int((block[0].weight == 0).sum()), 0 < run.error(batches=1) < 1
(64, True)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from besa.model.blocks import Linear
from besa.model.observe import observe
from besa.model.replay import Call
from besa.processes.ranks import ALONE, Ranks
from besa.pruning.activations import Activations
from besa.pruning.batches import Groups
from besa.pruning.config import PruneConfig
from besa.pruning.grams import LevelGrams, level_inputs
from besa.pruning.learn import (
    Learned,
    Learner,
    Loss,
    OnStep,
    balanced_error,
    group_square,
    learn,
    relative_error,
)
from besa.pruning.levels import Level, levels
from besa.pruning.masked import WeightFactory, masked
from besa.pruning.rounding import Steps, fit, rounded
from besa.pruning.scores import Hessians, InputNorms, wanda

T = TypeVar("T")

Tensors = dict[str, Tensor]  # [groups, rows, cols] by the linears' names


@dataclass(frozen=True)
class Pruned:
    """What a method makes of a block's linears.

    Attributes:
        masks: bool [groups, rows, cols] by name, True where a weight is kept.
        weights: the new weights by name, shaped like the masks; None: those of the checkpoint.
        losses: the mean loss of each epoch, if anything was learned.
    """

    masks: Tensors
    weights: Tensors | None = None
    losses: list[float] = field(default_factory=list)


@dataclass(kw_only=True)
class BlockRun:
    """A block, its linears and its batches.

    Attributes:
        stored: the block as the checkpoint has it; `put` changes it.
        linears: what is pruned.
        calls: how the model calls the block, batch by batch.
        stream: what enters it, [batch, tokens, width] each.
        dense_stream: what enters the block in the dense model, shaped like `stream`; None: that is
            not kept, and the dense block on `stream` stands for it.
        targets: what the dense block makes of `stream`, or for updates its outputs in the dense
            model: of all batches or the first ones.
        groups: which batches belong together, in a step of learning or held out.
        ranks: the processes that have the other batches of each group.
        device, dtype: of the computation.
        config: the settings of the run.
        generator: for what a method draws at random.
        on_step: is told of every step of learning.
        block: the block that runs, on the device and in the computation's dtype.
        weights: its dense weights [groups, rows, cols] by the linears' names.
        norms, hessians: statistics of the linears' inputs, once they are observed.
    """

    stored: nn.Module
    linears: Sequence[Linear]
    calls: Sequence[Call]
    stream: Sequence[Tensor]
    dense_stream: Sequence[Tensor] | None = None
    targets: Sequence[Tensor]
    device: torch.device
    dtype: torch.dtype
    config: PruneConfig
    groups: Groups
    ranks: Ranks = ALONE
    generator: torch.Generator = field(default_factory=torch.Generator)
    on_step: OnStep = lambda step: None
    block: nn.Module = field(init=False)
    weights: Tensors = field(init=False)
    norms: InputNorms = field(init=False)
    hessians: Hessians | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.block = copy_to(self.stored, self.device, self.dtype)
        self.weights = self._matrices(self.block)
        self.norms = InputNorms(self.linears, self.device)
        # Where they are the same, those on the device are, which spares a copy for each `put`.
        self._stored_weights = {
            name: self.weights[name] if weight.dtype == self.dtype else weight
            for name, weight in self._matrices(self.stored).items()
        }

    def _matrices(self, block: nn.Module) -> Tensors:
        """The weights as they are now; what is put into the block later does not change them."""
        return {x.name: x.matrix(block.get_parameter(x.parameter).data) for x in self.linears}

    @property
    def seen(self) -> int:
        """How many of the batches, the first ones, are learned from."""
        return self.groups.seen

    def observe(self, hessians: bool, on_output: Callable[[int, Tensor], None]) -> None:
        """Runs the block on all batches, and gathers statistics of its linears' inputs.

        What is held out is not in the statistics, nor, before `share_statistics`, what the other
        processes see.

        Args:
            hessians: X^T X, too.
            on_output: is given each batch's index and the block's output.
        """
        self.norms = InputNorms(self.linears, self.device)
        self.hessians = Hessians(self.linears, self.device) if hessians else None

        self.expect(range(len(self.calls)), targets=False)
        with observe(self.block, self.linears, self.add_inputs):
            for i in range(self.seen):
                on_output(i, self.output(i))
        for i in range(self.seen, len(self.calls)):
            on_output(i, self.output(i))

    def add_inputs(self, linear: Linear, group: int, inputs: Tensor) -> None:
        """Adds inputs [tokens, cols] of one group to the statistics of a linear."""
        self.norms.add(linear, group, inputs)
        if self.hessians is not None:
            self.hessians.add(linear, group, inputs)

    def share_statistics(self) -> None:
        """Adds the inputs that the other processes saw to the statistics."""
        self.norms.sum_over(self.ranks)
        if self.hessians is not None:
            self.hessians.sum_over(self.ranks)

    def expect(self, order: Sequence[int], targets: bool = True) -> None:
        """Says in which order batches are read next, so that they are on the device by then.

        Args:
            targets: whether their targets are read, too.
        """
        _expect(self.stream, order)
        if targets:
            _expect(self.targets, order)

    def scores(self) -> Tensors:
        """Wanda's importance of every weight, float32 [groups, rows, cols] by name."""
        return {x.name: wanda(self.weights[x.name], self.norms.of(x)) for x in self.linears}

    def output(
        self, i: int, weights: Mapping[str, Sequence[WeightFactory]] | None = None
    ) -> Tensor:
        """What the block makes of batch `i`, [batch, tokens, width].

        Args:
            weights: used instead of the block's own, with gradients: by the linears' names, for
                each group what makes its matrix [rows, cols].
        """
        hidden = self.stream[i].to(self.device)
        if weights is None:
            return self.output_of(i, hidden)
        with masked(self.block, self.linears, weights):
            return self.calls[i].run(self.block, hidden)

    def output_of(self, i: int, hidden: Tensor) -> Tensor:
        """What the block makes of any hidden states, called as for batch `i`."""
        return self.calls[i].run(self.block, hidden.to(self.device))

    def learn(
        self, learner: Learner[T], epochs: int = 1, loss: Loss = relative_error
    ) -> Learned[T]:
        """What a learner of the block's matrices, linear by linear, learns on the seen batches."""

        def forward(i: int, weights: Sequence[WeightFactory]) -> Tensor:
            parts = zip(self.linears, self.by_linear(weights), strict=True)
            return self.output(i, {x.name: factories for x, factories in parts})

        return learn(
            learner,
            forward,
            self.targets,
            steps=self.groups.steps,
            loss=loss,
            epochs=epochs,
            generator=self.generator,
            on_step=self.on_step,
            on_order=self.expect,
            ranks=self.ranks,
        )

    def matrices(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The matrices [rows, cols] of all groups of all linears, linear by linear."""
        return [matrix for x in self.linears for matrix in tensors[x.name].contiguous().unbind()]

    def by_linear(self, values: Sequence[T]) -> list[list[T]]:
        """One value for each matrix, gathered by linear."""
        rest = iter(values)
        return [list(islice(rest, linear.groups)) for linear in self.linears]

    def levels(self) -> list[Level]:
        """The linears by who reads whose output (`besa.pruning.levels`)."""
        # Which experts a batch reaches differs, and the order is to be the same everywhere.
        return self.ranks.from_leader(
            lambda: levels(self.block, self.linears, lambda: self.output(0))
        )

    def grams(self, level: Level, weights: Tensors) -> LevelGrams:
        """Products of a level's inputs over all that is seen, with `weights` in the block.

        Args:
            weights: [groups, rows, cols] by the linears' names; they stay in the running block.
        """
        grams = LevelGrams(self.device)
        dense_stream = self.dense_stream
        self.expect(range(self.seen), targets=False)
        if dense_stream is not None:
            _expect(dense_stream, range(self.seen))
        for i in range(self.seen):
            hidden, call = self.stream[i].to(self.device), self.calls[i]
            dense_hidden = hidden if dense_stream is None else dense_stream[i].to(self.device)
            self.use(self.weights)
            dense = level_inputs(self.block, level, call, dense_hidden)
            self.use(weights)
            inputs = level_inputs(self.block, level, call, hidden)
            grams.add(inputs, dense, hidden.shape[:-1].numel())
        grams.sum_over(self.ranks)
        return grams

    def kept(self, pruned: Pruned) -> Tensors:
        """The weights [groups, rows, cols] by name that are left, zero where they are not."""
        weights = pruned.weights or self.weights
        return {name: torch.where(mask, weights[name], 0.0) for name, mask in pruned.masks.items()}

    def use(self, weights: Tensors) -> None:
        """Puts weights [groups, rows, cols] by name into the running block, in its dtype."""
        for linear in self.linears:
            running = self.block.get_parameter(linear.parameter)
            placed = linear.stored(weights[linear.name], running)
            running.data = placed.to(self.device, self.dtype).contiguous()

    def agreed(self, pruned: Pruned) -> Pruned:
        """What process 0 has of it, which another kind of processor may have rounded otherwise."""
        if self.ranks.size == 1:
            return pruned
        masks = {name: mask.contiguous() for name, mask in pruned.masks.items()}
        weights = pruned.weights
        if weights is not None:
            weights = {name: weight.contiguous() for name, weight in weights.items()}
        self.ranks.broadcast_(*masks.values(), *(weights or {}).values())
        return replace(pruned, masks=masks, weights=weights)

    def put(self, pruned: Pruned) -> None:
        """Puts pruned weights into the stored block, and into the running one what is stored.

        So what is measured and handed on is rounded to the checkpoint's dtype, and before that as
        the settings ask.
        """
        weights = pruned.weights or self._stored_weights
        for linear in self.linears:
            stored = self.stored.get_parameter(linear.parameter)
            mask = pruned.masks[linear.name].to(self.device)
            kept = torch.where(mask, weights[linear.name].to(self.device), 0.0)
            kept = self._rounded(linear, kept, stored.dtype).to(stored.dtype)
            placed = linear.stored(kept, stored).contiguous()
            stored.data = placed.to(stored.device)
            running = self.block.get_parameter(linear.parameter)
            running.data = placed.to(self.device, self.dtype)

    def _rounded(self, linear: Linear, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight [groups, rows, cols] as the settings round it."""
        grid = self.config.quantize
        if grid is None:
            return weight
        importance = self.norms.of(linear).square()
        groups = zip(weight, importance, strict=True)
        return torch.stack([rounded(matrix, own, grid, dtype) for matrix, own in groups])

    def steps(self, weights: Sequence[Tensor]) -> list[Steps]:
        """What the settings round matrices to, linear by linear; none where they do not."""
        grid = self.config.quantize
        if grid is None:
            return []
        importance = [norms.square() for x in self.linears for norms in self.norms.of(x)]
        stored = [self.stored_dtype(x) for x in self.linears for _ in range(x.groups)]
        parts = zip(weights, importance, stored, strict=True)
        return [fit(weight, own, grid, dtype) for weight, own, dtype in parts]

    def stored_dtype(self, linear: Linear) -> torch.dtype:
        """What the checkpoint stores a linear's weight in."""
        return self.stored.get_parameter(linear.parameter).dtype

    def error(self, batches: int) -> float:
        """||dense - pruned||^2 / ||dense||^2 of the block's output over the first batches.

        Args:
            batches: how many of this process's; all processes' are measured together.
        """
        self.expect(range(batches))
        sums = []
        for i in range(batches):
            target = self.targets[i].to(self.device).float()
            output = self.output(i).float()
            sums.append(torch.stack([(output - target).square().sum(), target.square().sum()]))
        # The device is waited for once.
        both = torch.stack(sums).tolist() if sums else []
        total = torch.tensor([[0.0, 0.0], *both], dtype=torch.float64).sum(0)
        self.ranks.sum_(total)
        wrong, right = total.tolist()
        return wrong / right if right else 0.0

    def held_out_error(self) -> float:
        """The mean `balanced_error` of the block's output over what is held out."""
        held_out = self.groups.held_out
        self.expect(range(self.seen, len(self.calls)))
        errors = torch.zeros(len(held_out), device=self.device)
        for error, group in zip(errors, held_out, strict=True):
            own = [self.targets[i].to(self.device) for i in group.batches]
            square = group_square(group, own, self.device, self.ranks)
            for i, target in zip(group.batches, own, strict=True):
                share = len(target) / group.windows
                error += balanced_error(self.output(i), target, square) * share
        self.ranks.sum_(errors)
        return float(errors.mean())


def _expect(batches: Sequence[Tensor], order: Sequence[int]) -> None:
    if isinstance(batches, Activations):
        batches.expect(order)


def copy_to(block: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a block on a device, its floating weights in `dtype`.

    Weights go there in one step: a copy of a module is a second one on its own device first.
    """
    weights: dict[int, Any] = {}
    for parameter in block.parameters():
        target = dtype if parameter.is_floating_point() else parameter.dtype
        moved = parameter.detach().to(device, target, copy=True)
        weights[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    return copy.deepcopy(block, weights).to(device, dtype)
