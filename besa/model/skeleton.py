"""A model without its weights, and which of its parameters each stored tensor goes into.

>>> from transformers import AutoConfig
>>> skeleton = skeleton_of(AutoConfig.from_pretrained("path/to/model"), torch.bfloat16)
>>> {parameter.device.type for parameter in skeleton.parameters()}
{'meta'}
>>> targets_of(["layers.0.mlp.up_proj.weight"], skeleton, conversions=[])
({'layers.0.mlp.up_proj.weight': 'model.layers.0.mlp.up_proj.weight'}, set())
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from besa.model.architecture import new_model


def skeleton_of(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model of a transformers config in evaluation mode, its parameters on the meta device.

    Its buffers are real: no file has them.
    """
    with _parameters_on_meta():
        skeleton = new_model(config, trust_remote_code, dtype=dtype, experts_implementation="eager")
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


def known_tokens(model: nn.Module) -> int | None:
    """How many tokens a model has embeddings for; its config may say another number.

    None for a model whose embeddings transformers does not find.
    """
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    weight = getattr(embeddings, "weight", None)
    return None if weight is None else int(weight.shape[0])


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
    found = all_targets_of(keys, model, conversions)
    targets = {key: names[0] for key, (names, _) in found.items()}
    return targets, {key for key, (_, pattern) in found.items() if pattern is not None}


def renamings_and_converters(
    conversions: Sequence[Any],
) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """A model's conversions as transformers tells them apart."""
    return (
        [entry for entry in conversions if isinstance(entry, WeightRenaming)],
        [entry for entry in conversions if isinstance(entry, WeightConverter)],
    )


def by_source_pattern(converters: Iterable[WeightConverter]) -> dict[str, WeightConverter]:
    """Each converter by the patterns of the names that it takes."""
    return {pattern: entry for entry in converters for pattern in entry.source_patterns}


def all_targets_of(
    keys: Iterable[str], model: nn.Module, conversions: list[Any]
) -> dict[str, tuple[list[str], str | None]]:
    """All parameters that each stored tensor goes into, and how it is converted on the way.

    That is the pattern of a converter that its name fits, or None where it is renamed at most.
    """
    renamings, converters = renamings_and_converters(conversions)
    by_pattern = by_source_pattern(converters)
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[list[str], str | None]] = {}
    for key in keys:
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in known and key in known:
            found[key] = [key], None
            continue
        several = by_pattern[pattern].target_patterns if pattern else [""]
        names = [target.replace(several[0], other) for other in several]
        found[key] = names, pattern
    return found


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """The other names of each parameter that has several, as of a head or a shared block."""
    groups: dict[str, list[str]] = {}
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(source, [source]).append(name)
    return {name: [n for n in group if n != name] for group in groups.values() for name in group}
