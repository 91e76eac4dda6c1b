"""`besa bench --shape`: a real model's shape with random weights, dense and pruned and packed.

>>> config = shape_config("tinyllama")
>>> config["hidden_size"], config["num_hidden_layers"]
(2048, 22)
>>> shape_config("gpt-oss-20b", layers=2)["layer_types"]
['sliding_attention', 'full_attention']

`random_contenders` makes the models and removes them at its end.

The weights are written layer by layer, so that a model needs no more memory than one layer. What
they say means nothing, and every table says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from besa.bench.events import OnEvent, Step, ignore
from besa.bench.settings import Contender
from besa.errors import BesaError, one_line
from besa.model.blocks import Linear, expert_count, find_blocks, find_linears
from besa.model.files import INDEX, write_tensors
from besa.model.skeleton import skeleton_of, targets_of
from besa.processes.child import ChildError, run_to_end
from besa.writing import write_text

_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    **_TOKENS,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
    "llama-2-7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        **_TOKENS,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "sliding_window": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **_TOKENS,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **_TOKENS,
    },
}
_TEMPORARY = "besa-bench-shape-"


@contextmanager
def random_contenders(
    shape: str,
    sparsity: float,
    pattern: str,
    quantize: str | None,
    cache: Path | None,
    on_event: OnEvent = ignore,
    layers: int | None = None,
) -> Iterator[tuple[Contender, ...]]:
    """The dense model and the packed one; removed afterwards unless there is a cache.

    Args:
        layers: only so many, which their names say.

    Raises:
        BesaError: no such shape, sparsity or pattern, or they cannot be written.
    """
    config = shape_config(shape, layers)
    of = "" if layers is None else f", {layers} of {layers_of(shape_config(shape))} layers"
    keep = parse_pattern(pattern)
    if not 0 < sparsity < 1:
        raise BesaError(f"--sparsity is {sparsity}: above 0 and below 1")
    if keep is not None:
        sparsity = 1 - keep[0] / keep[1]
    label = pattern if keep else f"{100 * sparsity:g}%"
    name = f"{label} {quantize}" if quantize else label
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    _remove_stale()
    folder = cache or Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dense = folder / f"{Path(shape).stem}-{key}-random-dense"
        sparse = (
            folder / f"{Path(shape).stem}-{key}-random-{name.replace(' ', '-').replace(':', '-')}"
        )
        if not dense.exists():
            on_event(Step(f"writes {dense.name}"))
            make_model(dense, config, None)
        if not sparse.exists():
            on_event(Step(f"writes {sparse.name}"))
            _make_sparse(folder, sparse, config, (sparsity, keep), quantize)
        yield (
            Contender("dense" + of, str(dense), random_weights=True),
            Contender(name + of, str(sparse), random_weights=True),
        )
    finally:
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape, by name or from a file.

    Args:
        layers: only so many, the first ones.

    Raises:
        BesaError: neither, or it has fewer layers.
    """
    config = {**_read_shape(shape), "dtype": "bfloat16"}
    if layers is None:
        return config
    most = layers_of(config)
    if not 0 < layers <= most:
        raise BesaError(f"--layers {layers}: {shape} has {most}")
    by_layer = {k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == most}
    return {**config, **by_layer, "num_hidden_layers": layers}


def layers_of(config: dict[str, Any]) -> int:
    """How many layers a config has.

    Raises:
        BesaError: it does not say.
    """
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise BesaError("--layers: the config.json has no num_hidden_layers")
    return layers


def _read_shape(shape: str) -> dict[str, Any]:
    if shape in SHAPES:
        return SHAPES[shape]
    path = Path(shape)
    if not path.is_file():
        raise BesaError(f"--shape {shape} is none of {', '.join(SHAPES)}, and no config.json")
    with one_line(f"{path} is no config.json"):
        config: dict[str, Any] = json.loads(path.read_text())
        config.pop("quantization_config", None)
        if "model_type" not in config:
            raise BesaError(f"{path} has no model_type")
    return config


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """N and M of an N:M pattern; None for unstructured.

    Raises:
        BesaError: it is neither.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]) <= 64:
        raise BesaError(f"--pattern {pattern} is neither unstructured nor N:M, as 2:4")
    return int(match[1]), int(match[2])


def _make_sparse(
    folder: Path,
    out: Path,
    config: dict[str, Any],
    how: tuple[float, tuple[int, int] | None],
    quantize: str | None,
) -> None:
    """The same weights, pruned at random, and what `besa export` makes of them."""
    pruned = folder / f"{out.name}-pruned"
    try:
        make_model(pruned, config, how)
        command = [sys.executable, "-P", "-m", "besa", "export", str(pruned), "--out", str(out)]
        if quantize:
            command += ["--quantize", quantize]
        try:
            run_to_end(command, 24 * 3600)
        except ChildError as error:
            raise BesaError(f"packing {out.name}: {error}") from None
    finally:
        shutil.rmtree(pruned, ignore_errors=True)


def make_model(
    out: Path, config: dict[str, Any], how: tuple[float, tuple[int, int] | None] | None
) -> None:
    """Writes a model of random bfloat16 weights, the same for the same config, with a tokenizer.

    Args:
        how: sparsity and N:M of the blocks' linears; None for dense.
    """
    groups: dict[str, list[_Stored]] = {}
    for tensor in _stored(config):
        block = re.search(r"\.\d+\.", tensor.name)
        groups.setdefault(tensor.name[: block.end()] if block else "", []).append(tensor)
    partial = out.with_name(out.name + ".writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        index: dict[str, str] = {}
        for number, members in enumerate(groups.values(), 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {one.name: _weights(one, how) for one in members}
            write_tensors(tensors, partial / file)
            index |= dict.fromkeys(tensors, file)
        write_text(json.dumps({"metadata": {}, "weight_map": index}), partial / INDEX)
        write_text(json.dumps(config, indent=2), partial / "config.json")
        write_tokenizer(partial, int(config["vocab_size"]))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a checkpoint.

    Attributes:
        linear: what of a block it belongs to that is pruned, or None.
    """

    name: str
    shape: tuple[int, ...]
    linear: Linear | None


def _stored(config: dict[str, Any]) -> list[_Stored]:
    """Every tensor that the checkpoint stores, under the names that are usual on disk."""
    from transformers import AutoConfig

    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with one_line("--shape: the model cannot be made"):
        own = AutoConfig.for_model(config["model_type"], **fields)
        model = skeleton_of(own, torch.bfloat16)
        name, blocks = find_blocks(model)
        experts = expert_count(own)
        linears = {
            f"{name}.{index}.{linear.parameter}": linear
            for index, block in enumerate(blocks)
            for linear in find_linears(block, f"{name}.{index}", experts, strict=False)
        }
        state = model.state_dict()
        if own.get_text_config().tie_word_embeddings:
            state.pop("lm_head.weight", None)
        stored = revert_weight_conversion(model, state)
    targets, _ = targets_of(stored, model, get_model_conversion_mapping(model))
    return [_Stored(k, tuple(t.shape), linears.get(targets[k])) for k, t in stored.items()]


def _weights(stored: _Stored, how: tuple[float, tuple[int, int] | None] | None) -> Tensor:
    weight = _random(stored.name, stored.shape)
    if how is None or stored.linear is None:
        return weight
    turned = stored.linear.transposed and weight.ndim > 1
    matrix = weight.mT if turned else weight
    pruned = _pruned(stored.name, matrix.reshape(-1, matrix.shape[-1]), *how).view(matrix.shape)
    return pruned.mT.contiguous() if turned else pruned


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(name))
    if len(shape) < 2:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(shape, fill, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def _pruned(name: str, weight: Tensor, sparsity: float, keep: tuple[int, int] | None) -> Tensor:
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(_seed(name) + 1))
    if keep is None:
        return weight.masked_fill(drawn < sparsity, 0)
    rows, columns = weight.shape
    kept, of = keep
    if columns % of:
        return weight
    groups = drawn.view(rows, columns // of, of)
    dropped = groups.argsort(-1)[..., : of - kept]
    mask = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, dropped, True)
    return weight.masked_fill(mask.view(rows, columns), 0)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


def write_tokenizer(directory: Path, size: int) -> None:
    """A tokenizer whose first tokens are bytes; every other one decodes to a word of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    entries = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"Ġw{index}" for index in range(size - len(entries))]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(entries[:size])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(directory)


def _remove_stale() -> None:
    """What runs that were killed have left."""
    for path in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*-*"):
        pid = path.name.removeprefix(_TEMPORARY).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
