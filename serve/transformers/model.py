"""A transformers model's linears made sparse before its weights are loaded, and dense afterwards.

>>> import besa
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("path/to/sparse")
>>> sum(isinstance(module, SparseLinear) for module in model.modules())
21
>>> model = make_dense(model)
>>> sum(isinstance(module, SparseLinear) for module in model.modules())
0

`from_pretrained` calls `make_sparse` on the model before it loads the files, and `finish_loading`
after that. `make_sparse` reads all that can be wrong with a packed checkpoint before anything is
loaded: headers, bitmasks and scales, a tenth of it. Names in files need not be those of the model:
they are renamed as transformers renames them when it loads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.formats import FormatError, Packed, PackedConfig, packed_of, packed_weights
from besa.formats.checkpoint import parts_in
from besa.formats.experts import SparseExperts
from besa.formats.module import SparseLinear
from besa.model.blocks import find_blocks
from besa.model.files import WHOLE
from besa.model.layout import layout_of
from besa.model.skeleton import all_targets_of
from besa.serve.transformers.experts import keeping_parts, make_sparse_experts


def make_sparse(model: nn.Module, files: Sequence[str], config: PackedConfig) -> list[str]:
    """Puts sparse modules, on the meta device, where the files have packed weights.

    Returns:
        The stored names of the packed weights.

    Raises:
        BesaError: a damaged file; a packed weight that is damaged, or for which the model has no
            linear of its shape; a weight of the model that no file has.
    """
    if getattr(model.config, "distributed_config", None) is not None:
        raise BesaError(
            "transformers cannot share a packed model out among processes: serve it with vLLM, or "
            "make it dense first, with `besa export --format dense`"
        )
    with _opened(files) as stored:
        packed, parts = packed_weights(stored), parts_in(stored)
        dense = [name for name in stored if name not in parts]
        conversions = get_model_conversion_mapping(model)
        found = all_targets_of([*dense, *packed], model, conversions)
        targets = {name: names[0] for name, (names, _) in found.items()}
        _check_complete(model, {target for names, _ in found.values() for target in names})
        unchanged = {name: targets[name] for name in dense if found[name][1] is None}
        _check_dense(model, {new: stored[name] for name, new in unchanged.items()})

        def read(name: str, rows: int, cols: int) -> Packed:
            return _read(stored, name, rows, cols, config)

        experts = make_sparse_experts(
            model, {name: targets[name] for name in packed}, conversions, config.int8_input, read
        )
        for name in packed:
            target = targets[name]
            linear = None if name in experts else _linear(model, target, name)
            if linear is not None:
                layout, dtype = layout_of(linear), linear.weight.dtype
                weight = read(name, layout.rows, layout.cols).to("meta")
                sparse = SparseLinear(
                    weight, linear.bias, config.int8_input, dtype, layout.transposed
                )
                model.set_submodule(target.removesuffix(".weight"), sparse)
        names = {name: experts.get(name, targets[name]) for name in packed}
        _check_names(parts, names, model, keeping_parts(conversions))
        return packed


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """What the floating tensors of a model are to be, all but those of its packed weights."""
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear | SparseExperts)]
    packed = {id(buffer) for module in sparse for buffer in module.buffers()}
    return {
        name: tensor.dtype
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and id(tensor) not in packed
    }


def finish_loading(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Checks every packed weight, and finds its row pointers, once all are loaded.

    Args:
        dtypes: of the other tensors. Where transformers converts or renames one of a checkpoint
            with a quantization_config, it leaves it as it is stored.

    Raises:
        FormatError: a weight that was not loaded, or not as the files have it.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in dtypes and tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear | SparseExperts):
            try:
                module.finish_loading()
            except FormatError as error:
                raise FormatError(f"{name}.{error}") from None


def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with ordinary linears, each unpacked as its packed weight is let go.

    Args:
        dtype: of the weights; None for what each had if the model were dense.

    Raises:
        BesaError: parts of the model are offloaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BesaError("a model that is offloaded in part cannot be made dense: load it whole")
    modules = model.named_modules()
    names = [name for name, m in modules if isinstance(m, SparseLinear | SparseExperts)]
    for name in names:
        sparse = model.get_submodule(name)
        if isinstance(sparse, SparseExperts):
            dense = sparse.to_dense(dtype or sparse.dtype)
        else:
            assert isinstance(sparse, SparseLinear)
            dense = _dense_linear(sparse, dtype or sparse.dtype)
        model.set_submodule(name, dense.train(sparse.training))
    return model


def _dense_linear(sparse: SparseLinear, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """The linear that a packed one stands for."""
    with torch.device("meta"):
        linear = (
            Conv1D(sparse.out_features, sparse.in_features)
            if sparse.transposed
            else nn.Linear(sparse.in_features, sparse.out_features, bias=False)
        )
    linear.weight = nn.Parameter(sparse.unpack(dtype))
    linear.bias = sparse.bias
    return linear


@contextmanager
def _opened(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Slices of all stored tensors, by name."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise BesaError("packed weights are loaded from safetensors files, and none are there")
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BesaError(
                    f"{file} is damaged or cut off ({error}): export the model again"
                ) from None
            stored |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        yield stored


def _check_complete(model: Any, stored: set[str]) -> None:
    """Where a file lacks a weight, transformers would go on with a random one.

    All of the model has to be there if the files are of this class; a class with another head may
    make that new, but not what is in the blocks.
    """
    same = type(model).__name__ in (model.config.architectures or ())
    prefix = "" if same else find_blocks(model)[0] + "."
    ignored = "|".join(model._keys_to_ignore_on_load_missing or ["(?!)"])
    tied = model.all_tied_weights_keys
    for name, _ in model.named_parameters():
        optional = name in tied or re.search(ignored, name)
        if name.startswith(prefix) and name not in stored and not optional:
            raise BesaError(f"the checkpoint lacks the weight {name}: export the model again")


def _check_dense(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Raises a BesaError for a dense tensor of another shape than the model's, or of no floats.

    Where a checkpoint has a quantization_config, transformers leaves that to who reads it.

    Args:
        stored: slices, by what the model calls them.
    """
    known = model.state_dict()
    for name, tensor in stored.items():
        if name not in known:
            continue
        shape, kind = tensor.get_shape(), tensor.get_dtype()
        if kind.startswith(WHOLE) and known[name].is_floating_point():
            raise BesaError(f"{name} is stored as {kind}, and has to be of floats")
        if known[name].shape != torch.Size(shape):
            raise BesaError(
                f"{name} is {list(shape)}, but config.json makes it {list(known[name].shape)}: "
                "export the model again"
            )


def _check_names(
    parts: Mapping[str, str], names: Mapping[str, str], model: nn.Module, conversions: list[Any]
) -> None:
    """Raises a BesaError for a part that is renamed otherwise than its weight.

    It would not be found, and nothing would say so.

    Args:
        parts: each part's weight.
        names: what the model calls each weight.
    """
    known = model.state_dict()
    for part, (found, _) in all_targets_of(parts, model, conversions).items():
        weight = parts[part]
        expected = names[weight] + part.removeprefix(weight)
        if expected in known and found != [expected]:
            raise BesaError(
                f"{part} cannot be loaded: transformers renames it to {found[0]}, not {expected}"
            )


def _linear(model: nn.Module, weight: str, stored: str) -> nn.Linear | Conv1D | None:
    """The linear of a weight, None if there is no such weight in the model."""
    try:
        module = model.get_submodule(weight.rpartition(".")[0])
    except AttributeError:
        return None  # a part that this class of model lacks, and that transformers reports
    if not isinstance(module, nn.Linear | Conv1D) or not weight.endswith(".weight"):
        raise BesaError(
            f"{stored} is packed, but {weight} in transformers' {type(model).__name__} is no "
            "linear's weight: load it with the transformers that it was exported with"
        )
    return module


def _read(
    stored: Mapping[str, Any], name: str, rows: int, cols: int, config: PackedConfig
) -> Packed:
    """A packed weight [rows, cols] whose tensors lie in the files' memory map, checked.

    Raises:
        FormatError: it is damaged, or of another shape.
    """

    def read(part: str) -> Tensor | None:
        return stored[part][...] if part in stored else None

    packed = packed_of(read, name, cols, config)
    if packed.shape != (rows, cols):
        raise FormatError(
            f"{name} is {list(packed.shape)}, but config.json makes it {[rows, cols]}"
        )
    numbers = read(name + "_rows")
    if numbers is None:
        raise FormatError(f"{name}_rows is missing")
    if numbers.dtype != torch.int32 or not torch.equal(numbers, torch.arange(rows).int()):
        raise FormatError(f"{name}_rows does not count the rows")
    return packed
