"""How the parts of packed experts come from a checkpoint to their layer, whatever the model.

vLLM's models sort a checkpoint's tensors in ways of their own, and cut experts by the shapes that
dense ones have. But before, each stream of tensors goes through one mapper of names, which a
quantization method may add to. The one here takes the parts of packed experts out of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from besa.formats.checkpoint import SUFFIXES

# "model.layers.3.mlp.experts.7.up_proj.weight": the layer, the expert if it is one, its weight.
_NAME = re.compile(r"(?P<layer>.+?)(?:\.(?P<expert>\d+))?\.(?P<weight>[^.]+?)(?:\.weight)?")


class TakesParts(Protocol):
    """A layer of experts, while it is loaded."""

    def take(self, expert: int | None, weight: str, suffix: str, tensor: Tensor) -> bool:
        """Takes one tensor of a packed weight; False if it has no such weight.

        Args:
            expert: whose weight it is; None if it is of all of them.
            weight: as vLLM calls it, such as "up_proj" or "w13_weight".
            suffix: which part of the packed weight the tensor is.
        """
        ...


class PackedWeightsMapper(WeightsMapper):  # type: ignore[misc]
    """vLLM's renaming of tensors, in which parts of packed experts are taken by their layers.

    vLLM joins mappers by `|`. What this one is joined with is such a mapper, too.
    """

    def __init__(
        self, layers: Mapping[str, TakesParts], names: WeightsMapper | None = None
    ) -> None:
        """Takes the names of another mapper.

        Args:
            layers: by their names in vLLM's model.
        """
        self._names = names or WeightsMapper()
        super().__init__(**vars(self._names))
        self._layers = layers

    def __or__(self, other: WeightsMapper) -> PackedWeightsMapper:
        return PackedWeightsMapper(self._layers, self._names | other)

    def __ror__(self, other: WeightsMapper) -> PackedWeightsMapper:
        return PackedWeightsMapper(self._layers, other | self._names)

    def apply(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        renamed = self._names.get_rename_mapper()

        def others() -> Iterator[tuple[str, Any]]:
            for name, tensor in weights:
                suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
                # A mapper knows the weight's name, not those of its parts.
                weight = renamed.apply_list([name.removesuffix(suffix)]) if suffix else []
                if not (suffix and weight and self._take(weight[0], suffix, tensor)):
                    yield name, tensor

        yield from self._names.apply(others())

    def _take(self, weight: str, suffix: str, tensor: Tensor) -> bool:
        """Gives a part to the layer that it is of; False if there is none."""
        if (found := _NAME.fullmatch(weight)) is None:
            return False
        layer = self._layer(found["layer"])
        expert = None if found["expert"] is None else int(found["expert"])
        return layer is not None and layer.take(expert, found["weight"], suffix, tensor)

    def _layer(self, name: str) -> TakesParts | None:
        """A layer by its name, in the whole model or in the part of it that is being loaded."""
        if name in self._layers:
            return self._layers[name]
        found = [layer for own, layer in self._layers.items() if own.endswith(f".{name}")]
        return found[0] if len(found) == 1 else None
