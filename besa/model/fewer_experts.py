"""What is stored of a model, with some of its experts gone and their routers shrunk.

Experts are stored stacked, or each under names with its number; a router's tensors have an entry
for each expert. Both are told by shapes and numbers, never by a family's name.

>>> names = [f"layers.2.moe.experts.{expert}.up.weight" for expert in range(4)]
>>> renumbered(names, count=4, kept=[1, 3])["layers.2.moe.experts.3.up.weight"]
'layers.2.moe.experts.1.up.weight'
>>> fewer_in_config({"num_experts": 4, "num_experts_per_tok": 2}, count=4, left=2)
{'num_experts': 2, 'num_experts_per_tok': 2}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.blocks import EXPERT_COUNTS
from besa.model.checkpoint import Checkpoint
from besa.model.files import open_tensors
from besa.model.routing import Stack


def tensors_with(
    checkpoint: Checkpoint, index: int, kept: Mapping[Stack, Sequence[int]]
) -> dict[str, Tensor]:
    """A block's stored tensors with the experts `kept` of each stack, which are counted anew.

    Raises:
        BesaError: besa does not see how the experts are stored, or what routes to them.
    """
    by_target: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.block_keys[index]:
        by_target[checkpoint.targets[key]].append(key)
    tensors: dict[str, Tensor] = {}
    routed: set[Stack] = set()
    with open_tensors(checkpoint.files, checkpoint.block_keys[index]) as slices:
        for target, keys in by_target.items():
            stored = {key: slices[key][...] for key in keys}
            for stack, experts in kept.items():
                place = f"{checkpoint.blocks_name}.{index}.{stack.name}"
                beside = place.rpartition(".")[0]
                if target.startswith(place + "."):
                    stored = _fewer(checkpoint, stored, stack.count, experts)
                elif (
                    "." in stack.name
                    and target.startswith(beside + ".")
                    and any(stack.count in tensor.shape for tensor in stored.values())
                ):
                    stored = _fewer(checkpoint, stored, stack.count, experts)
                    routed.add(stack)
            tensors |= stored
    for stack in kept.keys() - routed:
        raise cannot_drop(checkpoint, f"besa finds no router beside {stack.name}")
    return tensors


def _fewer(
    checkpoint: Checkpoint, stored: Mapping[str, Tensor], count: int, kept: Sequence[int]
) -> dict[str, Tensor]:
    """What of a parameter's stored tensors remains."""
    if numbered := renumbered(list(stored), count, kept):
        return {new: stored[key] for key, new in numbered.items()}
    for key, tensor in stored.items():
        if count not in tensor.shape or not tensor.is_floating_point():
            raise cannot_drop(checkpoint, f"{key} does not show which part is which expert's")
    index = torch.tensor(kept)
    return {key: x.index_select(x.shape.index(count), index) for key, x in stored.items()}


def renumbered(keys: Sequence[str], count: int, kept: Sequence[int]) -> dict[str, str]:
    """The new names of the stored tensors of the experts `kept`; none where names have no number.

    Args:
        keys: of all that one parameter of the model is made of.
        count: of experts.
    """
    parts = {key: key.split(".") for key in keys}
    for place in range(min(map(len, parts.values()))):
        numbers = {own[place] for own in parts.values()}
        if numbers == {str(expert) for expert in range(count)}:
            new = {str(old): str(number) for number, old in enumerate(kept)}
            return {
                key: ".".join([*own[:place], new[own[place]], *own[place + 1 :]])
                for key, own in parts.items()
                if own[place] in new
            }
    return {}


def fewer_in_config(config: Mapping[str, Any], count: int, left: int) -> dict[str, Any]:
    """What config.json says, with the number of experts changed from `count` to `left`."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return {**config, "text_config": fewer_in_config(text, count, left)}
    return {
        name: left if name in EXPERT_COUNTS and value == count else value
        for name, value in config.items()
    }


def cannot_drop(checkpoint: Checkpoint, reason: str) -> BesaError:
    """What to say where besa does not see how to drop experts."""
    kind = type(checkpoint.model).__name__
    return BesaError(f"besa cannot drop experts of a {kind}: {reason}; leave --drop-experts out")
