"""A decoder as a graph of the ONNX standard's operators alone, opset 23, by torch.onnx.

>>> out = Path("onnx")
>>> out.mkdir()
>>> build_standard(Path("path/to/pruned"), out)

For every architecture of transformers whose cache is keys and values: its own code is traced
(torch.onnx.export with dynamo). Inputs and outputs have the names that ONNX Runtime GenAI's builder
gives them, and `genai_config.json` describes them, so that what reads the one reads the other.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from besa.export.onnx.builder import DATA, MODEL, GraphError
from besa.export.onnx.experts import ALL_EXPERTS
from besa.model.loading import load_model
from besa.model.quiet import quiet
from besa.writing import write_text

OPSET = 23

# How transformers computes attention, the first that can be traced: as it chooses, mostly as one
# operator, which takes no keys that heads share unasked; or as products and a softmax.
_ATTENTIONS = (None, "eager")

# Lengths that the tracer does not take for constants.
_BATCH, _NEW, _OLD = 2, 3, 5


class _Step(nn.Module):
    """The model as a function: tokens and a cache give logits and the longer cache."""

    def __init__(self, model: Any, positions: bool) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        known = {"position_ids": position_ids} if self.positions else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past),
            use_cache=True,
            **known,
        )
        layers = out.past_key_values.layers
        return (out.logits, *(part for layer in layers for part in (layer.keys, layer.values)))


@torch.no_grad()
def build_standard(source: Path, out: Path, trust_remote_code: bool = False) -> None:
    """Writes the graph of a checkpoint, its data, `genai_config.json` and the tokenizer to `out`.

    Args:
        trust_remote_code: whether code that lies beside the checkpoint may run.

    Raises:
        GraphError: the model's cache is no list of keys and values, or torch cannot trace it.
    """
    for attention in _ATTENTIONS:
        model = load_model(source, "float32", "cpu", trust_remote_code, attention)
        model.set_experts_implementation(ALL_EXPERTS)
        layers, heads, size = _cache_of(model, source)
        positions = "position_ids" in inspect.signature(model.forward).parameters
        try:
            with _quiet():
                graph = _trace(_Step(model, positions).eval(), layers, heads, size, positions)
            break
        except Exception:  # noqa: BLE001 - torch's tracer raises what its many layers raise
            if attention == _ATTENTIONS[-1]:
                kind = type(model).__name__
                raise GraphError(f"torch cannot trace {source}, which is a {kind}") from None
    graph.graph.sort()
    ir.save(graph, out / MODEL, external_data=DATA)
    config = _genai_config(model, layers, heads, size, positions)
    write_text(json.dumps(config, indent=4) + "\n", out / "genai_config.json")
    with contextlib.suppress(OSError, ValueError):  # a model may have come without one
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(out)


def _cache_of(model: Any, source: Path) -> tuple[int, int, int]:
    """Layers, heads and the size of a head, as the model's own cache has them."""
    with quiet():
        kept = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    parts = [
        getattr(layer, part, None)
        for layer in getattr(kept, "layers", [])
        for part in ("keys", "values")
    ]
    shapes = {tuple(part.shape) for part in parts if part is not None}
    if len(shapes) != 1 or any(part is None for part in parts):
        raise GraphError(f"{source} keeps more than keys and values of one shape")
    (_, heads, _, size) = shapes.pop()
    return len(kept.layers), heads, size


def _trace(step: _Step, layers: int, heads: int, size: int, positions: bool) -> ir.Model:
    whole = _OLD + _NEW
    past = [
        (torch.randn(_BATCH, heads, _OLD, size), torch.randn(_BATCH, heads, _OLD, size))
        for _ in range(layers)
    ]
    new = {0: "batch_size", 1: "sequence_length"}
    old = {0: "batch_size", 2: "past_sequence_length"}
    names = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    program = torch.onnx.export(
        step,
        (
            torch.ones(_BATCH, _NEW, dtype=torch.long),
            torch.ones(_BATCH, whole, dtype=torch.long),
            torch.arange(_OLD, whole).expand(_BATCH, -1).contiguous(),
            past,
        ),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes={
            "input_ids": new,
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": new,
            "past": [(old, old) for _ in range(layers)],
        },
        input_names=[
            *("input_ids", "attention_mask", "position_ids"),
            *(f"past_key_values.{name}" for name in names),
        ],
        output_names=["logits", *(f"present.{name}" for name in names)],
        verbose=False,
    )
    assert program is not None
    model: ir.Model = program.model
    if not positions:
        unused = next(one for one in model.graph.inputs if one.name == "position_ids")
        model.graph.inputs.remove(unused)
    return model


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what torch's exporter prints and warns of on its way."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _genai_config(
    model: Any, layers: int, heads: int, size: int, positions: bool
) -> dict[str, Any]:
    """What ONNX Runtime GenAI reads of a decoder of any kind."""
    config = model.config.get_text_config()
    known = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    longest = getattr(config, "max_position_embeddings", None) or 2048
    generation = model.generation_config
    end = generation.eos_token_id if generation.eos_token_id is not None else known["eos"]
    first = end[0] if isinstance(end, list) else end
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    if positions:
        inputs["position_ids"] = "position_ids"
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first if known["bos"] is None else known["bos"],
            "eos_token_id": end,
            "pad_token_id": first if known["pad"] is None else known["pad"],
            "context_length": longest,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": heads,
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": longest,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
