"""A model without its weights, and which of its parameters each stored tensor goes into.

>>> from transformers import AutoConfig
>>> skeleton = skeleton_of(AutoConfig.from_pretrained("path/to/model"), torch.bfloat16)
>>> {parameter.device.type for parameter in skeleton.parameters()}
{'meta'}
>>> targets_of(["layers.0.mlp.up_proj.weight"], skeleton, conversions=[])
({'layers.0.mlp.up_proj.weight': 'model.layers.0.mlp.up_proj.weight'}, set())
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def skeleton_of(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a transformers config in evaluation mode, its parameters on the meta device.

    Its buffers are real: no file has them.
    """
    with _parameters_on_meta():
        skeleton: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="eager"
        )
    return skeleton.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device and their buffers real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def known_tokens(model: nn.Module) -> int:
    """How many tokens a model has embeddings for; its config may say another number."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def free_parameters(module: nn.Module) -> None:
    """Sends a module's parameters to the meta device; its buffers stay."""
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if not parameter.is_meta:
                each._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def targets_of(
    keys: Iterable[str], model: nn.Module, conversions: list[Any]
) -> tuple[dict[str, str], set[str]]:
    """Where stored tensors go in a model, by transformers' own renaming.

    Args:
        keys: names of stored tensors.
        conversions: those that transformers makes when it loads the model.

    Returns:
        targets: the parameter that each goes into, the first if there are several.
        converted: those that are cut up, stacked or turned on the way, as experts are.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    names = model.state_dict()
    targets, converted = {}, set()
    for key in keys:
        target, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, names
        )
        if target not in names and key in names:
            target = key
        elif converter is not None:
            converted.add(key)
        targets[key] = target
    return targets, converted
