"""Runs a block with masked weights, each of which exists only while it is used.

Learning a block's masks needs every masked weight in the forward pass and again in the backward
pass. Held from one to the other they are a second copy of the block, and their gradients a
third. `masked` makes a weight where the block takes it, forgets it after that operation and makes
it anew for the backward pass, so that one matrix and one gradient exist at a time. Of fused
experts only those that are used are made.

Any function may make the weights. A `MaskedMatrix` also knows how its gradient is made, so that a
linear takes it in one step of autograd, whose backward pass holds the matrix or the gradient to it,
never both.

>>> from besa.model.blocks import find_linears
>>> block = nn.Sequential(nn.Linear(16, 8))
>>> linears = find_linears(block, "block", experts=None)
>>> keep = torch.ones(8, 16, requires_grad=True)
>>> with masked(block, linears, {"0": [lambda: block[0].weight.detach() * keep]}):
...     output = block(torch.randn(4, 16))
>>> output.sum().backward()
>>> keep.grad.shape
torch.Size([8, 16])
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from besa.model.blocks import Linear

# Makes one masked matrix [rows, cols], differentiably, contiguous, with the same values each time.
WeightFactory = Callable[[], Tensor]


class MaskedMatrix(ABC):
    """A masked matrix [rows, cols] that is learned: a `WeightFactory` with its gradient.

    Attributes:
        parameter: what is learned, the mask or the weights; takes the gradient.
    """

    parameter: Tensor

    @abstractmethod
    def make(self) -> Tensor:
        """The masked matrix, contiguous, without a gradient."""

    @abstractmethod
    def gradient(self, upstream: Tensor) -> Tensor:
        """The gradient to `parameter` from that to the masked matrix, [rows, cols]."""

    def __call__(self) -> Tensor:
        """The masked matrix, differentiably."""
        return _Made.apply(self.parameter, self) if torch.is_grad_enabled() else self.make()


class _Made(torch.autograd.Function):
    """A masked matrix."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, matrix: MaskedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.make()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.matrix.gradient(grads[0]), None


class _Product(torch.autograd.Function):
    """`functional.linear` of inputs [..., cols] and a masked matrix.

    Each pass makes the matrix. In the backward pass it is gone before the gradient to it comes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, _: Tensor, matrix: MaskedMatrix
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.matrix = matrix
        return functional.linear(x, matrix.make(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        upstream = grads[0].reshape(-1, grads[0].shape[-1])
        to_x = to_bias = to_parameter = None
        if ctx.needs_input_grad[0]:
            to_x = (upstream @ ctx.matrix.make()).view(x.shape)
        if ctx.needs_input_grad[1]:
            to_bias = upstream.sum(0)
        if ctx.needs_input_grad[2]:
            to_parameter = ctx.matrix.gradient(upstream.mT @ x.reshape(-1, x.shape[-1]))
        return to_x, to_bias, to_parameter, None


class masked(TorchFunctionMode):
    """While it is entered, masked weights take the place of a block's parameters.

    Args:
        block: the block, as it is called inside.
        linears: the linears to mask.
        factories: what makes the weight of each group, by the linears' names.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Sequence[Linear],
        factories: Mapping[str, Sequence[WeightFactory]],
    ) -> None:
        super().__init__()
        self.parameters = [block.get_parameter(x.parameter) for x in linears]  # keeps the ids
        self.factories = {
            id(parameter): (x, list(factories[x.name]))
            for x, parameter in zip(linears, self.parameters, strict=True)
        }
        self.alive: dict[int, tuple[weakref.ref[Tensor], WeightFactory]] = {}
        # `_Product` keeps no weight, and hooks take time for each tensor that autograd keeps.
        self.hooks: AbstractContextManager[None] = nullcontext()
        if not all(_is_product(block, x, factories[x.name]) for x in linears):
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
        # Every operation of the block comes through here, which a GPU waits for; few concern us.
        if not (self._is_masked_in(args) or self._is_masked_in(kwargs.values())):
            return func(*args, **kwargs)
        if func is functional.linear and len(args) > 1 and kwargs.keys() <= {"bias"}:
            product = self._product(*args, **kwargs)
            if product is not None:
                return product
        if func is Tensor.__getitem__ and (known := self.factories.get(id(args[0]))):
            linear, factories = known
            if args[0].ndim == 3 and isinstance(args[1], int | Tensor) and _is_single(args[1]):
                matrix = self._made(factories[int(args[1])])
                return matrix.mT if linear.transposed else matrix
        if getattr(func, "__name__", "") == "__get__" and id(args[0]) in self.factories:
            attribute = func(*args)
            if not isinstance(attribute, Tensor):  # .shape, .dtype: those of the parameter
                return attribute
        args = self._with_stand_ins(args)
        return func(*args, **{name: self._with_stand_ins(x) for name, x in kwargs.items()})

    def _is_masked_in(self, values: Iterable[Any]) -> bool:
        """Whether a parameter that is masked may be among values, or in structures among them."""
        for value in values:
            if id(value) in self.factories:
                return True
            kind = type(value)
            if kind is tuple or kind is list:
                if self._is_masked_in(value):
                    return True
            elif isinstance(value, tuple | list | dict) and kind is not torch.Size:
                return True  # perhaps: pytree, which knows them all, takes long
        return False

    def _product(self, x: Any, weight: Any, bias: Any = None) -> Tensor | None:
        """`functional.linear` of a parameter's masked matrix; None where it is not as simple."""
        linear, factories = self.factories.get(id(weight), (None, ()))
        if linear is None or linear.transposed or len(factories) != 1 or id(x) in self.factories:
            return None
        matrix = factories[0]
        if not isinstance(matrix, MaskedMatrix):
            return None
        return _Product.apply(x, bias, matrix.parameter, matrix)

    def _with_stand_ins(self, value: Any) -> Any:
        """`_stand_in` for every tensor in a structure."""
        return pytree.tree_map_only(Tensor, self._stand_in, value)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """The masked weight in a parameter's place; any other tensor as it is."""
        known = self.factories.get(id(tensor))
        if known is None:
            return tensor
        linear, factories = known
        if len(factories) == 1:
            matrix = self._made(factories[0]).unsqueeze(0)
        else:
            matrix = self._made(lambda: torch.stack([factory() for factory in factories]))
        return linear.stored(matrix, tensor)

    def _made(self, factory: WeightFactory) -> Tensor:
        """A new masked weight; its factory is remembered while it lives."""
        weight = factory()
        self.alive[weight.untyped_storage().data_ptr()] = (weakref.ref(weight), factory)
        return weight

    def _pack(self, tensor: Tensor) -> Tensor | WeightFactory:
        """What autograd keeps of a tensor: of a masked weight, or a view of one, how to make it."""
        reference, factory = self.alive.get(tensor.untyped_storage().data_ptr(), (None, None))
        if reference is None or reference() is None:  # another tensor, perhaps in a freed place
            return tensor
        assert factory is not None
        layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        return partial(_made_again, factory, layout)

    @staticmethod
    def _unpack(kept: Tensor | WeightFactory) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()


@torch.no_grad()
def _made_again(factory: WeightFactory, layout: tuple[Any, Any, Any]) -> Tensor:
    return factory().as_strided(*layout)


def _is_product(block: nn.Module, linear: Linear, factories: Sequence[WeightFactory]) -> bool:
    """Whether the block takes a linear's weight by a call of `functional.linear`, and only so.

    If it should also take it elsewhere, autograd keeps that weight: memory, but no mistake.
    """
    module = block.get_submodule(linear.parameter.rpartition(".")[0])
    return (
        type(module).forward is nn.Linear.forward
        and len(factories) == 1
        and isinstance(factories[0], MaskedMatrix)
    )


def _is_single(index: int | Tensor) -> bool:
    return isinstance(index, int) or (index.ndim == 0 and index.dtype != torch.bool)
