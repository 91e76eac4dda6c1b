"""A mixture's experts whose weights are packed in memory, as transformers' models hold them.

>>> from besa.formats import pack
>>> dense = nn.Module()     # of two experts, as transformers has them: 32 inputs, 8 between
>>> dense.gate_up_proj = nn.Parameter(torch.randn(2, 16, 32))
>>> dense.down_proj = nn.Parameter(torch.randn(2, 32, 8))
>>> packed = {name: pack(each.flatten(0, 1)) for name, each in dense.named_parameters()}
>>> stacks = [Stack(name, {name: torch.arange(len(w.bitmask))}) for name, w in packed.items()]
>>> experts = SparseExperts(dense, stacks, packed, Activation("silu"))
>>> experts(torch.randn(5, 32), torch.randint(2, (5, 1)), torch.ones(5, 1)).shape
torch.Size([5, 32])
>>> [name for name in experts.state_dict() if name.startswith("down")]
['down_proj_values', 'down_proj_bitmask', 'down_proj_rows']

It stands where the module of the experts was, behind the model's own router: it gets the tokens,
the numbers of the experts that each goes to, and their weights. In memory it has two weights, the
rows of one expert after those of another. A state dict is what a file holds: experts that a file
has one by one are joined when they are loaded (`finish_loading`), and taken apart to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from besa.formats import FormatError, Packed, tensors_of
from besa.formats.checkpoint import SUFFIXES
from besa.formats.module import keeping_types, refuse_training
from besa.formats.slicing import join_rows, take_rows
from besa.kernels.experts import Activation, Weight, sparse_experts

# What is held of each of the two weights, as `up_values` and so on: a `Weight` but for its bias.
_ROLES = ("up", "down")
_HELD = ("values", "bitmask", "row_ptr", "scale", "steps")


@dataclass(frozen=True)
class Stack:
    """One of the two weights of a mixture's experts.

    Attributes:
        name: of the dense module's parameter [experts, out, in].
        parts: the stored weights that it is made of, by their names within the module, each with
            the rows of [experts * out, in] that its rows are.
        bias: the name of the parameter [experts, out] that is added; None if nothing is.
    """

    name: str
    parts: Mapping[str, Tensor]
    bias: str | None = None


class SparseExperts(nn.Module):
    """What a module of stacked experts computes, with packed weights.

    Attributes:
        num_experts: how many there are.
        stacks: the two weights, and how files hold them.
        activation: between them.
        sorted_input: whether it is called as Llama 4's experts are, see `forward`.
        transposed: whether the dense parameters are [experts, in, out].
        dtype: what the weights become when they are unpacked.
    """

    def __init__(
        self,
        dense: nn.Module,
        stacks: Sequence[Stack],
        packed: Mapping[str, Packed],
        activation: Activation,
        transposed: bool = False,
        sorted_input: bool = False,
        int8_input: bool = True,
    ) -> None:
        """Takes the place of `dense`.

        Args:
            packed: the weights of the stacks' parts, by name. On the meta device they wait to be
                loaded.
        """
        super().__init__()
        # In a tuple, so that it is no part of this module: its weights are not.
        self._dense = (dense,)
        parameters = [dense.get_parameter(stack.name) for stack in stacks]
        self.num_experts = len(parameters[0])
        self.dtype = parameters[0].dtype
        self.stacks, self.activation = tuple(stacks), activation
        self.transposed, self.sorted_input, self.int8_input = transposed, sorted_input, int8_input
        first = packed[next(iter(stacks[0].parts))]
        self.group_size, self.values_dtype = first.group_size, first.values.dtype
        self.in_features = {
            role: packed[next(iter(stack.parts))].in_features
            for role, stack in zip(_ROLES, stacks, strict=True)
        }
        for stack in stacks:
            if stack.bias is not None:
                self.register_parameter(stack.bias, dense.get_parameter(stack.bias))
        for role, held in product(_ROLES, _HELD):
            self.register_buffer(f"{role}_{held}", None, persistent=False)
        self.is_ready = False
        for name, weight in packed.items():
            place, own = self._place(name)
            for tensor_name, tensor in tensors_of(weight, own).items():
                place.register_buffer(tensor_name, tensor)
        if not first.row_ptr.is_meta:
            self.finish_loading()

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of what each token's experts make of it: [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden]; if `sorted_input` [experts * tokens, hidden], what
                each expert gets, zeros for a token that does not go to it.
            top_k_index, top_k_weights: [tokens, k], where each goes and what that counts; not if
                `sorted_input`.

        Raises:
            BesaError: in training, on the way back from the loss the gradient would get lost here.
        """
        refuse_training(self, hidden_states)
        up, down = self._weights()
        if top_k_index is None or top_k_weights is None:
            tokens = len(hidden_states) // self.num_experts
            experts = torch.arange(self.num_experts, device=hidden_states.device)
            top_k_index = experts.repeat_interleave(tokens).unsqueeze(1)
            if up.bias is None and down.bias is None:  # zeros give zeros: nothing is read for them
                goes = hidden_states.any(1, keepdim=True)
                top_k_index = torch.where(goes, top_k_index, -1)
            top_k_weights = torch.ones_like(top_k_index, dtype=hidden_states.dtype)
        return sparse_experts(
            hidden_states,
            up,
            down,
            top_k_index,
            top_k_weights,
            self.activation,
            up.bias,
            down.bias,
            self.int8_input,
        )

    def _weights(self) -> list[Weight]:
        """Both weights as the operator takes them."""
        return [
            Weight(
                **{held: getattr(self, f"{role}_{held}") for held in _HELD},
                bias=None if stack.bias is None else getattr(self, stack.bias),
            )
            for role, stack in zip(_ROLES, self.stacks, strict=True)
        ]

    @property
    def packed(self) -> tuple[Packed, ...]:
        """Both weights, [experts * out, in]; they share the module's tensors."""
        return tuple(
            Packed(*weight[:4], self.in_features[role], self.group_size, weight.steps)
            for role, weight in zip(_ROLES, self._weights(), strict=True)
        )

    def _place(self, part: str) -> tuple[nn.Module, str]:
        """The module that holds a part while it is loaded, and the part's name there."""
        place: nn.Module = self
        *folders, own = part.split(".")
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, nn.Module())
            place = place.get_submodule(folder)
        return place, own

    def finish_loading(self) -> None:
        """After its parts were loaded: checks and joins them.

        A file's tensor that is all of a weight stays where it was loaded, in the file's memory map
        on a CPU. Others are copied together.

        Raises:
            FormatError: a part is no packed weight.
        """
        for role, stack in zip(_ROLES, self.stacks, strict=True):
            parts = [self._taken(name, self.in_features[role]) for name in stack.parts]
            whole = join_rows(parts, list(stack.parts.values()))
            for held in _HELD:
                setattr(self, f"{role}_{held}", getattr(whole, held))
        for folder in [name for name, _ in self.named_children()]:
            delattr(self, folder)
        self.is_ready = True

    def _taken(self, part: str, in_features: int) -> Packed:
        """A part that was loaded, checked, which is no longer held."""
        place, own = self._place(part)
        values, bitmask, _, scale, steps = (
            place._buffers.pop(own + suffix, None) for suffix in SUFFIXES
        )
        assert values is not None
        assert bitmask is not None
        try:
            return Packed.from_tensors(values, bitmask, in_features, scale, self.group_size, steps)
        except FormatError as error:
            raise FormatError(f"{part}: {error}") from None

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that it stands for, with its weights unpacked as `dtype`."""
        (dense,) = self._dense
        for packed, stack in zip(self.packed, self.stacks, strict=True):
            weight = packed.unpack(dtype).unflatten(0, (self.num_experts, -1))
            weight = weight.mT.contiguous() if self.transposed else weight
            dense.register_parameter(stack.name, nn.Parameter(weight))
            if stack.bias is not None:
                dense.register_parameter(stack.bias, getattr(self, stack.bias))
        return dense

    def extra_repr(self) -> str:
        names = ", ".join(stack.name for stack in self.stacks)
        values = str(self.values_dtype).removeprefix("torch.")
        return f"{self.num_experts} experts, {names}, {self.activation}, values={values}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseExperts:
        """What `.to` and its like do to every tensor; here they move values, and cast none."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(keeping_types(fn), recurse)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_ready:
            return
        for whole, stack in zip(self.packed, self.stacks, strict=True):
            for name, rows in stack.parts.items():
                part = take_rows(whole, rows)
                # Several parts each in memory of their own, as a writer of files expects.
                part = part if len(stack.parts) == 1 else part.clone()
                destination.update(tensors_of(part, prefix + name))
