"""The quantization method "besa": which of vLLM's layers are packed, and what loads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from besa.formats import QUANT_METHOD, PackedConfig
from besa.kernels.isa import chosen_isa
from besa.serve.vllm.experts import PackedExpertsMethod
from besa.serve.vllm.linear import PackedLinearMethod
from besa.serve.vllm.weights import PackedWeightsMapper

logger = init_logger("vllm.besa")


@register_quantization_config(QUANT_METHOD)
class BesaConfig(QuantizationConfig):  # type: ignore[misc]
    """The quantization method, as vLLM asks for it."""

    def __init__(self, config: PackedConfig) -> None:
        super().__init__()
        self.config = config
        self.ignore = list(config.ignore)
        self.experts: dict[str, PackedExpertsMethod] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BesaConfig:
        parsed = PackedConfig.from_dict(config)
        logger.info("besa: packed %s weights, kernels %s (%s)", parsed.values, *chosen_isa())
        return cls(parsed)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # below 8.0, plain torch expands the weight

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def get_checkpoint_weight_mapper(self) -> PackedWeightsMapper:
        return PackedWeightsMapper(self.experts)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            if not self.config.experts or prefix in self.ignore:
                return None
            self.experts[prefix] = PackedExpertsMethod(self.config, layer, prefix)
            return self.experts[prefix]
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        if all(f"{parent}.{part}" in self.ignore for part in parts):
            return UnquantizedLinearMethod()
        return PackedLinearMethod(self.config, prefix, _turned_heads(layer))


def _turned_heads(layer: LinearBase) -> dict[str, int]:
    """How many heads of a layer's queries and keys vLLM turns by their weights' names.

    It does so in Llama 4, whose rotary embedding is of neighbours, before any loader is called.
    """
    text_config = get_current_vllm_config().model_config.hf_text_config
    if not isinstance(layer, QKVParallelLinear) or text_config.model_type != "llama4_text":
        return {}
    return {"q": layer.total_num_heads, "k": layer.total_num_kv_heads}
