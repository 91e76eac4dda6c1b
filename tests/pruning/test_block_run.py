"""A block's run: what is put into it, what it gives with other weights, and how wrong that is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from besa.methods import METHODS
from besa.model.blocks import find_linears
from besa.model.replay import Call
from besa.pruning.batches import single
from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.budget import Budget, budgets
from besa.pruning.config import PruneConfig
from besa.pruning.methods import load

EXPERTS = 3


class Block(nn.Module):
    """A linear, and experts in one parameter that are all used."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 8, 8) / 3)

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        outputs = [nn.functional.linear(up, self.experts[i]) for i in range(EXPERTS)]
        return torch.stack(outputs).sum(0)


def block_run(
    dtype: torch.dtype = torch.float32, method: str = "wanda", batches: int = 4, held_out: int = 0
) -> BlockRun:
    """An observed run, with all targets."""
    torch.manual_seed(0)
    targets: list[Tensor] = []
    block = Block().to(dtype)
    run = BlockRun(
        stored=block,
        linears=find_linears(block, "block", EXPERTS),
        calls=[Call((), {})] * batches,
        stream=[torch.randn(1, 8, 16) for _ in range(batches)],
        targets=targets,
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=PruneConfig(out="pruned"),
        groups=single([1] * batches, held_out),
    )
    with torch.no_grad():
        run.observe(load(method).hessians, lambda i, output: targets.append(output))
    return run


def budget_of(run: BlockRun) -> Budget:
    return Budget(zeros=sum(x.size for x in run.linears) // 2, rate=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_a_block_to_its_budget(method: str):
    run = block_run(method=method)
    with torch.no_grad():
        run.put(load(method).mask(run, budget_of(run)))
        error = run.error(4)
    assert sum(int((p == 0).sum()) for p in run.stored.parameters()) == budget_of(run).zeros
    assert 0 < error < 1


@torch.no_grad()
def test_what_was_put_before_leaves_no_trace():
    once, twice = block_run(), block_run()
    pruned = load("wanda").mask(once, budget_of(once))
    once.put(pruned)
    shapes = {x.name: (x.groups, x.rows, x.cols) for x in twice.linears}
    twice.put(Pruned({name: torch.zeros(s, dtype=torch.bool) for name, s in shapes.items()}))
    assert twice.error(4) == 1.0
    assert all(weight.any() for weight in twice.weights.values())
    twice.put(pruned)
    for a, b in zip(once.block.parameters(), twice.block.parameters(), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_the_block_that_runs_has_the_stored_rounding():
    run = block_run(torch.bfloat16)
    weights = {name: torch.randn_like(weight) for name, weight in run.weights.items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    run.put(Pruned(masks, weights))
    for stored, running in zip(run.stored.parameters(), run.block.parameters(), strict=True):
        assert (stored.dtype, running.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(stored.float(), running)


def test_output_with_other_weights_has_their_gradients_and_changes_nothing():
    run = block_run()
    keep = {x.name: torch.ones(x.groups, x.rows, x.cols, requires_grad=True) for x in run.linears}
    factories = {
        x.name: [
            lambda name=x.name, i=i: run.weights[name][i] * keep[name][i] for i in range(x.groups)
        ]
        for x in run.linears
    }
    output = run.output(0, factories)
    torch.testing.assert_close(output, run.targets[0])
    output.square().sum().backward()
    assert all(mask.grad is not None and mask.grad.any() for mask in keep.values())
    assert run.error(4) == 0.0


def test_a_block_without_linears_has_nothing_to_learn():
    run = block_run()
    run.linears = []
    assert load("besa").mask(run, Budget(0, 0.5)) == Pruned({})


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 0.5, 0.77])
def test_budgets_add_up_to_the_target(rate: float):
    linears = find_linears(Block(), "block", EXPERTS)
    plan = [linears, [], linears[:1], linears]
    found = budgets(plan, PruneConfig(out="pruned", sparsity=rate))
    assert sum(b.zeros for b in found) == round(rate * sum(x.size for part in plan for x in part))
    for budget, part in zip(found, plan, strict=True):
        assert abs(budget.zeros - rate * sum(x.size for x in part)) <= 1


def test_a_run_goes_with_its_last_reference():
    """What observes a block does not hold it: a block after the next would be in memory, too."""
    gc.disable()
    try:
        run = block_run()
        block = weakref.ref(run.block)
        del run
        assert block() is None
    finally:
        gc.enable()
