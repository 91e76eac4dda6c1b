"""Packed experts in transformers: put behind a model's own routers, for any family.

>>> import besa
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("path/to/sparse-mixture")
>>> model.model.layers[0].mlp.experts
SparseExperts(4 experts, gate_up_proj, down_proj, Activation(function='silu', ...), values=float32)

transformers 5 holds a layer's experts in one module of stacked parameters, and joins those that a
file has one by one. Packed ones go into `SparseExperts` under names of their own, which joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from besa.errors import BesaError
from besa.formats import Packed
from besa.formats.checkpoint import SUFFIXES
from besa.formats.experts import SparseExperts, Stack
from besa.model.blocks import stacked
from besa.model.expert_function import function_of
from besa.model.expert_parts import Part, parts_of
from besa.model.skeleton import renamings_and_converters

# In a pattern of names: what follows is no part of a packed weight. Without inner brackets, which
# transformers would not take out where it makes a name of a pattern.
_NO_PART = f"(?!{'|'.join(SUFFIXES)})"


def make_sparse_experts(
    model: nn.Module,
    targets: Mapping[str, str],
    conversions: list[Any],
    int8_input: bool,
    read: Callable[[str, int, int], Packed],
) -> dict[str, str]:
    """Puts `SparseExperts`, on the meta device, where the files have packed experts.

    Args:
        targets: of each packed weight of the files, the parameter of the model that it goes into.
        conversions: those that transformers makes when it loads the model.
        read: gives a packed weight [rows, cols] by its stored name, checked.

    Returns:
        What the model calls each of their stored weights from now on.

    Raises:
        BesaError: a packed weight is damaged or missing, or the model computes its experts in a
            way that besa does not know.
    """
    wanted = set(targets.values())
    stacks = {
        name: stacked(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name in wanted
    }
    parts = parts_of(stacks, targets, model, conversions)
    kept = renamings_and_converters(keeping_parts(conversions))
    names: dict[str, str] = {}
    for owner in dict.fromkeys(target.rpartition(".")[0] for target in stacks):
        module = model.get_submodule(owner)
        function = function_of(module)
        if function is None:
            raise BesaError(
                f"the experts of {owner} are packed, and besa does not know what transformers' "
                f"{type(module).__name__} computes: load the model with the transformers that it "
                "was exported with"
            )
        found: list[Stack] = []
        packed: dict[str, Packed] = {}
        for weight, bias in zip(function.weights, function.biases, strict=True):
            stored = parts.get(f"{owner}.{weight}")
            if stored is None:
                raise BesaError(
                    f"{owner}.{weight} is not packed as a whole: export the model again"
                )
            own_names = [_own_name(part, owner, model, kept) for part in stored]
            rows = {name: part.rows for name, part in zip(own_names, stored, strict=True)}
            found.append(Stack(weight, rows, bias))
            for name, part in zip(own_names, stored, strict=True):
                packed[name] = read(part.key, part.layout.rows, part.layout.cols).to("meta")
                names[part.key] = f"{owner}.{name}"
        sparse = SparseExperts(
            module,
            found,
            packed,
            function.activation,
            function.transposed,
            function.sorted_input,
            int8_input,
        )
        model.set_submodule(owner, sparse)
    return names


def _own_name(
    part: Part,
    owner: str,
    model: nn.Module,
    kept: tuple[list[WeightRenaming], list[WeightConverter]],
) -> str:
    """What a stored weight is called within the module of its experts, once it is renamed."""
    suffix = SUFFIXES[0]
    name, _ = rename_source_key(part.key + suffix, *kept)
    prefix = f"{model.base_model_prefix}."
    for start in (owner, owner.removeprefix(prefix), prefix + owner):
        if name.startswith(start + "."):
            return name.removeprefix(start + ".").removesuffix(suffix)
    raise BesaError(
        f"{part.key} cannot be loaded: transformers renames it to {name.removesuffix(suffix)}, "
        f"which is not in {owner}; unpack the model with `besa export --format dense`"
    )


def keeping_parts(conversions: Sequence[Any], packed: Collection[str] = ()) -> list[Any]:
    """What transformers does to stored tensors, but that it converts no part of a packed weight.

    Where a file has experts one by one, their parts have names that begin as those which
    transformers joins.

    Args:
        packed: the packed weights of the files. What would join them counts as used, so that the
            model is saved as it was stored once it is dense.
    """
    renamings, converters = renamings_and_converters(conversions)
    for name in packed:
        rename_source_key(name, renamings, converters)
    return [_keeping(entry) if entry in converters else entry for entry in conversions]


def _keeping(converter: WeightConverter) -> WeightConverter:
    """The same converter, which takes no part of a packed weight."""
    own = WeightConverter(
        [pattern + _NO_PART for pattern in converter._original_source_patterns],
        [pattern + _NO_PART for pattern in converter._original_target_patterns],
        converter.operations,
        converter.force_cpu,
    )
    own.scope_prefix, own.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    own._was_used = converter.was_used()
    return own
