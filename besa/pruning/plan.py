"""Which linears of a model are pruned.

>>> config = PruneConfig(out="pruned", include="[01].self_attn.q_proj")
>>> plan = plan_of(Checkpoint.open("path/to/model"), config)
>>> [[linear.name for linear in linears] for linears in plan]
[['self_attn.q_proj'], ['self_attn.q_proj'], []]
"""

from __future__ import annotations

import re

from besa.errors import BesaError
from besa.model.blocks import Linear, expert_count, find_linears
from besa.model.checkpoint import Checkpoint
from besa.pruning.config import PruneConfig
from besa.pruning.shared import own_linears


def plan_of(checkpoint: Checkpoint, config: PruneConfig) -> list[list[Linear]]:
    """The linears to prune, block by block.

    Raises:
        BesaError: one of them cannot be pruned as it was asked for, or there is none.
    """
    experts = expert_count(checkpoint.config)
    plan = []
    for index, block in enumerate(checkpoint.blocks):
        name = f"{checkpoint.blocks_name}.{index}"
        linears = find_linears(block, name, experts, config.exclude)
        linears = own_linears(checkpoint, index, linears)
        if config.include:
            linears = [x for x in linears if re.search(config.include, f"{name}.{x.name}")]
        for linear in linears:
            if config.pattern.m and linear.cols % config.pattern.m:
                raise BesaError(
                    f"{name}.{linear.name} has {linear.cols} inputs, which {config.pattern.m} does "
                    f"not divide: leave it dense with --exclude '{re.escape(linear.name)}', or "
                    "choose another pattern"
                )
        plan.append(linears)
    if not any(plan):
        if config.include or config.exclude:
            raise BesaError("--include and --exclude leave no linear to prune")
        kind = type(checkpoint.blocks[0]).__name__
        raise BesaError(f"{kind} has no linear that besa knows how to prune")
    return plan
