"""Packed checkpoints in transformers: packed in memory, or dense on request.

>>> import besa
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("path/to/sparse")  # 9 of 16 bits a weight
>>> model.save_pretrained("copy")  # packed again
>>> dense = AutoModelForCausalLM.from_pretrained(
...     "path/to/sparse", quantization_config=besa.BesaConfig(dense=True)
... )  # to train, to convert
>>> dense = model.dequantize()  # the same, afterwards

The packed linears are `SparseLinear`s, and a mixture's experts are `SparseExperts` behind the
model's own router, whatever `experts_implementation` says; everything else is as ever, and so are
`device_map`, `dtype`, `torch.compile` and generation. `dtype` is of what is dense, and of the
activations: values stay what they were stored as. Packed weights cannot be trained. transformers'
own tensor parallelism and its offloading to disk do not take them; vLLM does the former.

Without `import besa`, transformers warns of an "Unknown quantization type, got besa", reports all
packed weights as missing, and goes on with random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa.errors import BesaError
from besa.formats import QUANT_METHOD, PackedConfig
from besa.formats.checkpoint import SUFFIXES

# What follows is imported by transformers in the midst of its own import: the parts of transformers
# that work on whole models are not there yet, and `besa.serve.transformers.model` is left for
# later.


@auto.register_quantization_config(QUANT_METHOD)
class BesaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a packed checkpoint is to be loaded.

    Attributes:
        dense: whether its weights are unpacked, so that the model is an ordinary one.
        packed: what its config.json says; None in a config that the user made.
    """

    def __init__(self, dense: bool = False, packed: PackedConfig | None = None) -> None:
        self.quant_method = QUANT_METHOD
        self.dense = dense
        self.packed = packed

    @property
    def dequantize(self) -> bool:
        """What transformers calls `dense`."""
        return self.dense

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Reads the `quantization_config` of a config.json.

        Raises:
            BesaError: a version of the format that this besa does not know.
        """
        config = cls(packed=PackedConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"quant_method": QUANT_METHOD} if self.packed is None else self.packed.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user's config may say of a checkpoint that has one of its own."""
        return {"dense": self.dense}


# The types whose `get_loading_attributes` transformers heeds.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, BesaConfig)


@auto.register_quantizer(QUANT_METHOD)
class BesaQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads a packed checkpoint."""

    quantization_config: BesaConfig

    def __init__(self, quantization_config: BesaConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise BesaError("BesaConfig is for packed checkpoints: `besa export` makes one")
        self.packed: list[str] = []  # the names of the files' packed weights, once they are read

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise BesaError("packed weights are not offloaded to disk: choose another device_map")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from besa.serve.transformers.model import dtypes_of, make_sparse

        assert self.quantization_config.packed is not None
        # transformers makes the skeleton on the meta device; what is read of files is real.
        with torch.device("cpu"):
            self.packed = make_sparse(
                model, checkpoint_files or [], self.quantization_config.packed
            )
        self.dtypes = dtypes_of(model)

    def update_weight_conversions(
        self,
        weight_conversions: list[Any],
        model: nn.Module | None = None,  # noqa: ARG002 - given by transformers from 5.24 on
    ) -> list[Any]:
        """What transformers does to stored tensors, but to parts of packed weights."""
        from besa.serve.transformers.experts import keeping_parts

        return keeping_parts(weight_conversions, self.packed)

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """The type to cast a tensor to; None for parts of a packed weight, which are not cast."""
        if converter.target_patterns[0].endswith(SUFFIXES):
            return None  # what is dense and has such a name gets its type in `finish_loading`
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        from besa.serve.transformers.model import finish_loading, make_dense

        finish_loading(model, self.dtypes)
        return make_dense(model) if self.quantization_config.dense else model

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        # Not `_dequantize`, which is told one type for all weights, by its name once it was saved.
        from besa.serve.transformers.model import make_dense

        make_dense(model, dtype)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
