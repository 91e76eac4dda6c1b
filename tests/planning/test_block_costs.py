"""Costs of one block, against what torch counts and keeps when the block runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from besa.model.blocks import expert_count, experts_per_token, find_blocks, find_linears
from besa.model.replay import capture
from besa.planning.block_costs import forward_flops, kept_activations, partial_flops
from besa.planning.shapes import BlockShape, LinearShape, attention_of
from besa.pruning.batches import single
from besa.pruning.block_run import BlockRun
from besa.pruning.config import PruneConfig
from besa.pruning.kept_weights import KeptWeights
from tests.helpers import random_model

TOKENS = 48


def block_and_shape(family: str, **changes: Any) -> tuple[BlockRun, BlockShape, Any]:
    """A family's first block with a batch of TOKENS tokens, its shape and its config."""
    model = random_model(family, **changes).float().eval()
    model.config._experts_implementation = "eager"  # as when besa prunes
    name, blocks = find_blocks(model)
    linears = find_linears(blocks[0], f"{name}.0", expert_count(model.config))
    hidden, calls = capture(
        model.get_submodule(name.split(".")[0]), list(blocks), [torch.arange(TOKENS)[None] % 9]
    )
    run = BlockRun(
        stored=blocks[0],
        linears=linears,
        calls=[calls[0][0]],
        stream=hidden,
        targets=hidden,
        groups=single([len(one) for one in hidden]),
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=PruneConfig(out="pruned"),
    )
    chosen, experts = experts_per_token(model.config), expert_count(model.config)
    shapes = [
        LinearShape(
            x.name, x.groups, x.rows, x.cols, chosen / experts if chosen and x.groups > 1 else 1.0
        )
        for x in linears
    ]
    size = sum(p.numel() for p in blocks[0].parameters())
    return run, BlockShape(tuple(shapes), size), model.config


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "mixtral"])
def test_flops_are_those_that_torch_counts(family: str):
    run, shape, config = block_and_shape(family)
    # Products of fused attention are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run.output(0)
    # A router is all that is not the same.
    expected = forward_flops(shape, attention_of(config), TOKENS, TOKENS)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_activations_are_those_that_autograd_keeps(family: str):
    run, shape, config = block_and_shape(family, hidden_size=64, intermediate_size=192)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    masks = {x.name: torch.ones(x.rows, x.cols, dtype=torch.bool) for x in run.linears}
    weights = {
        x.name: [
            KeptWeights(
                run.weights[x.name][0].clone().requires_grad_(), masks[x.name], torch.float32
            )
        ]
        for x in run.linears
    }
    own = {m.parameter.untyped_storage().data_ptr() for (m,) in weights.values()}
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        run.output(0, weights)
    found = sum(size for place, size in kept.items() if place not in own)
    expected = kept_activations(shape, attention_of(config), TOKENS, TOKENS)
    assert found == pytest.approx(expected, rel=0.25)


def test_levels_are_those_that_running_the_block_finds():
    run, shape, config = block_and_shape("llama")
    found = [[x.name for x in level.linears] for level in run.levels()]
    assert [[x.name for x in level] for level in shape.levels] == found
    ways = partial_flops(shape, attention_of(config), TOKENS, TOKENS)
    assert ways[0] == 0
    assert ways == sorted(ways)
    assert ways[-1] < forward_flops(shape, attention_of(config), TOKENS, TOKENS)
