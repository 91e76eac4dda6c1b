"""Runs a block with masked weights, each of which exists only while it is used.

Learning a block's masks needs every masked weight in the forward pass and again in the backward
pass. Held from one to the other they are a second copy of the block, and their gradients a
third. `masked` makes a weight where the block takes it, forgets it after that operation and makes
it anew for the backward pass, so that one matrix and one gradient exist at a time. Of fused
experts only those that are used are made.

    with masked(block, linears, {"self_attn.q_proj": [lambda: weight * mask], ...}):
        output = call.run(block, hidden)
    loss(output).backward()
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from besa.model.blocks import Linear

# Makes one masked matrix [rows, cols], differentiably, contiguous, with the same values each time.
Make = Callable[[], Tensor]


class masked(TorchFunctionMode):
    """While it is entered, masked weights take the place of a block's parameters.

    Args:
        block: the block, as it is called inside.
        linears: the linears to mask.
        makes: one `Make` per group, by the linears' names.
    """

    def __init__(
        self, block: nn.Module, linears: Sequence[Linear], makes: Mapping[str, Sequence[Make]]
    ) -> None:
        super().__init__()
        self.makes = {
            id(block.get_parameter(x.parameter)): (x, list(makes[x.name])) for x in linears
        }
        self.parameters = [block.get_parameter(x.parameter) for x in linears]  # keeps the ids
        self.alive: dict[int, tuple[weakref.ref[Tensor], Make]] = {}
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> masked:
        super().__enter__()
        self.hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.hooks.__exit__(*raised)
        super().__exit__(*raised)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and (known := self.makes.get(id(args[0]))):
            linear, makes = known
            if args[0].ndim == 3 and isinstance(args[1], int | Tensor) and _is_single(args[1]):
                matrix = self._made(makes[int(args[1])])
                return matrix.mT if linear.transposed else matrix
        if getattr(func, "__name__", "") == "__get__" and id(args[0]) in self.makes:
            attribute = func(*args)
            if not isinstance(attribute, Tensor):  # .shape, .dtype: those of the parameter
                return attribute
        args, kwargs = pytree.tree_map_only(Tensor, self._stand_in, (args, dict(kwargs)))
        return func(*args, **kwargs)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        known = self.makes.get(id(tensor))
        if known is None:
            return tensor
        linear, makes = known
        if len(makes) == 1:
            matrix = self._made(makes[0]).unsqueeze(0)
        else:
            matrix = self._made(lambda: torch.stack([make() for make in makes]))
        return linear.stored(matrix, tensor)

    def _made(self, make: Make) -> Tensor:
        made = make()
        self.alive[made.untyped_storage().data_ptr()] = (weakref.ref(made), make)
        return made

    def _pack(self, tensor: Tensor) -> Tensor | Make:
        """What autograd keeps of a tensor: of a masked weight, or a view of one, how to make it."""
        reference, make = self.alive.get(tensor.untyped_storage().data_ptr(), (None, None))
        if reference is None or reference() is None:  # another tensor, perhaps in a freed place
            return tensor
        assert make is not None
        layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        return partial(_remade, make, layout)

    @staticmethod
    def _unpack(kept: Tensor | Make) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()


@torch.no_grad()
def _remade(make: Make, layout: tuple[Any, Any, Any]) -> Tensor:
    return make().as_strided(*layout)


def _is_single(index: int | Tensor) -> bool:
    return isinstance(index, int) or (index.ndim == 0 and index.dtype != torch.bool)
