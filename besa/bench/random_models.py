"""`besa bench --shape`: a real model's shape with random weights, dense and pruned and packed.

>>> config = shape_config("tinyllama")
>>> config["hidden_size"], config["num_hidden_layers"]
(2048, 22)

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.bench.events import OnEvent, Step, ignore
from besa.bench.settings import Contender
from besa.errors import BesaError, one_line
from besa.model.files import INDEX, write_tensors
from besa.processes.child import ChildError, run_to_end
from besa.writing import write_text

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {
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
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
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
) -> Iterator[tuple[Contender, ...]]:
    """The dense model and the packed one; removed afterwards unless there is a cache.

    Raises:
        BesaError: no such shape, sparsity or pattern, or they cannot be written.
    """
    config = shape_config(shape)
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
            Contender("dense", str(dense), random_weights=True),
            Contender(name, str(sparse), random_weights=True),
        )
    finally:
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)


def shape_config(shape: str) -> dict[str, Any]:
    """The config.json of a shape, by name or from a file.

    Raises:
        BesaError: neither.
    """
    if shape in SHAPES:
        return {**_LLAMA, **SHAPES[shape], "dtype": "bfloat16"}
    path = Path(shape)
    if not path.is_file():
        raise BesaError(f"--shape {shape} is none of {', '.join(SHAPES)}, and no config.json")
    with one_line(f"{path} is no config.json"):
        config: dict[str, Any] = json.loads(path.read_text())
        config.pop("quantization_config", None)
        if "model_type" not in config:
            raise BesaError(f"{path} has no model_type")
    return {**config, "dtype": "bfloat16"}


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
    shapes = _shapes(config)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        block = re.search(r"\.\d+\.", name)
        groups.setdefault(name[: block.end()] if block else "", {})[name] = shape
    partial = out.with_name(out.name + ".writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        index: dict[str, str] = {}
        for number, members in enumerate(groups.values(), 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: _random(name, shape) for name, shape in members.items()}
            if how is not None:
                tensors = {n: _pruned(n, t, *how) for n, t in tensors.items()}
            write_tensors(tensors, partial / file)
            index |= dict.fromkeys(members, file)
        write_text(json.dumps({"metadata": {}, "weight_map": index}), partial / INDEX)
        write_text(json.dumps(config, indent=2), partial / "config.json")
        write_tokenizer(partial, int(config["vocab_size"]))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the checkpoint stores."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    with one_line("--shape: the model cannot be made"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields)
        )
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(name))
    if len(shape) < 2:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(shape, fill, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def _pruned(name: str, weight: Tensor, sparsity: float, keep: tuple[int, int] | None) -> Tensor:
    if weight.ndim != 2 or not re.search(r"\.\d+\.", name):
        return weight
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
