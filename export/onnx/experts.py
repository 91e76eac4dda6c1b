"""A mixture's experts in a form that can be traced: all of them on every token.

transformers runs an expert on the tokens that the router sent to it, and how many these are is
known only at run time: a graph of fixed operators has no such loop. Here each expert is given every
token, and what the router did not choose counts nothing. That takes more arithmetic than the model
needs, and no more memory for a long prompt than for its widest layer; to look up each token's own
experts instead would copy their weights for every token.

>>> from pathlib import Path
>>> from besa.model.loading import load_model
>>> model = load_model(Path("path/to/model"), "float32", "cpu")
>>> model.set_experts_implementation(ALL_EXPERTS)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# By this name transformers finds it.
ALL_EXPERTS = "besa_all_experts"


def all_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' output, each expert's share by the router's weight.

    Args:
        module: transformers' experts of one block.
        hidden: [tokens, width].
        chosen: int64 [tokens, k], the router's choice.
        weights: [tokens, k], what each of them counts.

    Returns:
        [tokens, width].
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _products(module, name, hidden.unsqueeze(0))
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _products(module, "down_proj", inner)
    shares = torch.zeros(hidden.shape[0], outputs.shape[0], dtype=weights.dtype)
    shares = shares.scatter(1, chosen, weights)
    return (outputs * shares.mT.unsqueeze(-1)).sum(0).to(hidden.dtype)


def _products(module: Any, name: str, inputs: Tensor) -> Tensor:
    """Every expert's product: [1 or experts, tokens, in] gives [experts, tokens, out]."""
    matrices = getattr(module, name)
    outputs = inputs @ (matrices if module.is_transposed else matrices.mT)
    return outputs + getattr(module, f"{name}_bias").unsqueeze(1) if module.has_bias else outputs


ALL_EXPERTS_FUNCTIONS.register(ALL_EXPERTS, all_experts)
