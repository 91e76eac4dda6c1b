"""What `besa serve` would take of memory, by part: weights, cache of keys and values, workspace.

>>> plan = plan_serve(ServeConfig("path/to/sparse", engine="transformers"))
>>> plan.what, plan.missing
('packed as float32', {})
>>> list(plan.memory.parts)
['weights', 'cache of keys and values', 'engine and workspace']

Weights take in memory what they take in files: engines map packed values as they are, or move them
into another order. A cache is as large as besa would make it (`besa.serve.vllm.cpu`,
`besa.serve.transformers.batching`); vLLM on a GPU takes what it is let take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from besa.errors import BesaError
from besa.formats import PackedConfig
from besa.machine import memory
from besa.model.architecture import read_config
from besa.model.files import is_onnx, resolve
from besa.model.json_files import read_object
from besa.planning.parts import Moment
from besa.planning.shapes import attention_of, open_headers, quantized_as, shape_of
from besa.serve.command import engine_for
from besa.serve.cpu import longest_sequence
from besa.serve.launch import packing_of
from besa.serve.settings import ServeConfig, flag_value
from besa.serve.vllm.cpu import PROCESSES, cache_space
from besa.serve.vllm.engine import CACHE_VARIABLE, ranks_here

_GIB = 1 << 30

# The engine's process without a model: Python, torch, transformers; ONNX Runtime takes less.
_PROCESS = {"transformers": 900 << 20, "onnx": 500 << 20}

# Of a GPU's memory vLLM takes this share unless --gpu-memory-utilization says another, and of it
# some for its graphs and activations.
_SHARE, _GRAPHS = 0.92, 2 * _GIB

_UNBOUNDED = 65536  # tokens of a sequence, where a config sets no bound
_STEP = 2048  # tokens that are computed at once, at most


@dataclass(frozen=True)
class ServePlan:
    """What a server would take.

    Attributes:
        name: of the model.
        what: how its weights are stored.
        engine: that would serve.
        place: whose memory it is: "this machine's memory", or the GPU's name.
        memory: bytes by part.
        room: bytes that there are.
        per_token: bytes of a token's keys and values.
        sequence: of a sequence of `context` tokens.
        context: tokens of the longest sequence.
        cached_tokens: tokens that the cache has room for.
        advice: what to change if it does not fit.
        notes: what the figures rest on.
    """

    name: str
    what: str
    engine: str
    place: str
    memory: Moment
    room: int
    per_token: int
    sequence: int
    context: int
    cached_tokens: int
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def missing(self) -> dict[str, int]:
        """Bytes that are missing; a cache that holds no whole sequence is missing the rest."""
        found = max(self.memory.total - self.room, 0)
        if not found and self.cached_tokens < self.context and self.engine != "vllm":
            found = self.sequence - self.cached_tokens * self.per_token
        return {"memory": found} if found > 0 else {}


def cache_bytes(layers: int, kept: int, itemsize: int) -> int:
    """Bytes that a token's keys and values take: layers * (keys and values of a token) * itemsize.

    That some layers look at a window only, or share what they keep, is not taken off.
    """
    return layers * kept * itemsize


def plan_serve(config: ServeConfig) -> ServePlan:
    """Plans a server by config.json and the sizes of files; starts nothing.

    Raises:
        BesaError: no such model, or an engine that is not for it.
    """
    directory = resolve(config.model)
    engine = engine_for(config, directory).name
    if not (directory / "config.json").is_file():
        raise BesaError(f"{directory} has no config.json to plan by")
    raw = read_object(directory / "config.json")
    text = {**raw, **(raw.get("text_config") or {})}
    longest = int(text.get("max_position_embeddings") or _UNBOUNDED)
    asked = flag_value(config.engine_args, "--max-model-len")
    context = int(asked) if asked and asked.isdigit() else longest
    packing = packing_of(directory)
    weights, dtype = _weights(directory, packing)
    attention = attention_of(read_config(directory).get_text_config())
    per_token = cache_bytes(int(text.get("num_hidden_layers") or 0), attention.kept, dtype.itemsize)
    on_gpu = torch.cuda.is_available() and engine != "onnx"
    free = torch.cuda.mem_get_info()[0] if on_gpu else memory().available
    cache, notes = _cache(config, engine, text, weights, free, on_gpu, per_token, context)
    if engine == "vllm" and not asked and per_token:
        context = min(context, cache // per_token)  # --max-model-len auto
    parts = {
        "weights": weights,
        "cache of keys and values": cache,
        "engine and workspace": _workspace(engine, on_gpu, text, dtype.itemsize),
    }
    plan = ServePlan(
        name=directory.resolve().name,
        what=_words(directory, packing, dtype),
        engine=engine,
        place=f"on {torch.cuda.get_device_name()}" if on_gpu else "on the CPU",
        memory=Moment("serve", parts),
        room=free,
        per_token=per_token,
        sequence=per_token * context,
        context=context,
        cached_tokens=cache // per_token if per_token else 0,
        advice=(),
        notes=tuple(notes),
    )
    return replace(plan, advice=tuple(_advice(plan, packing is not None)))


def _weights(directory: Path, packing: PackedConfig | None) -> tuple[int, torch.dtype]:
    """Bytes of a model's weights, and the dtype of what is not packed."""
    if is_onnx(directory):
        data = sum(path.stat().st_size for path in directory.glob("*.onnx*"))
        return data, torch.float32
    files = list(directory.glob("*.safetensors"))
    shape = shape_of(open_headers(directory, packed=True))
    stored = sum(path.stat().st_size for path in files)
    return stored if files and packing else shape.stored_bytes, shape.dtype


def _words(directory: Path, packing: PackedConfig | None, dtype: torch.dtype) -> str:
    if is_onnx(directory):
        return "an ONNX graph"
    if packing is not None:
        return f"packed as {packing.values}"
    return f"dense, {quantized_as(directory) or str(dtype).removeprefix('torch.')}"


def _cache(
    config: ServeConfig,
    engine: str,
    text: dict[str, Any],
    weights: int,
    free: int,
    on_gpu: bool,
    per_token: int,
    context: int,
) -> tuple[int, list[str]]:
    """Bytes of the cache, and what to say of it.

    - vLLM on a CPU: VLLM_CPU_KVCACHE_SPACE, as set or as besa sets it;
    - vLLM on a GPU: what is left of its share of the GPU;
    - transformers: a quarter of free memory at most, after the weights are there;
    - ONNX Runtime: one sequence.
    """
    if engine == "vllm" and not on_gpu:
        ranks = ranks_here(config.engine_args) or 1
        given = os.environ.get(CACHE_VARIABLE)
        gib = int(given) if given and given.isdigit() else None
        gib = gib or cache_space(free, weights, longest_sequence(text), ranks)
        return gib * ranks * _GIB, [f"{CACHE_VARIABLE}={gib}, for each of {ranks} processes"]
    if engine == "vllm":
        share = float(flag_value(config.engine_args, "--gpu-memory-utilization") or _SHARE)
        total = torch.cuda.mem_get_info()[1]
        return max(0, int(share * total) - weights - _GRAPHS), ["vLLM takes what it is let take"]
    if engine == "transformers":
        from besa.serve.transformers.batching import tokens_in_cache

        left = max(0, free - weights - _PROCESS[engine])
        return tokens_in_cache(text, left) * per_token, []
    return per_token * context, ["requests are answered one after the other"]


def _workspace(engine: str, on_gpu: bool, text: dict[str, Any], itemsize: int) -> int:
    """The process, and the activations of a step.

    4 * tokens * (2 * width + 3 * inter) bytes of the widest layer, and a row of logits.
    """
    if engine == "vllm":
        return _GRAPHS if on_gpu else PROCESSES
    width = int(text.get("hidden_size") or 0)
    inter = int(text.get("intermediate_size") or 4 * width)
    step = itemsize * _STEP * (2 * width + 3 * inter)
    return _PROCESS[engine] + step + 4 * int(text.get("vocab_size") or 0)


def _advice(plan: ServePlan, packed: bool) -> Iterator[str]:
    """What takes less, what gains most first."""
    if not plan.missing:
        return
    if plan.memory.parts["weights"] > plan.room / 2:
        words = "--quantize int4 with `besa export`" if packed else "`besa prune` and `besa export`"
        yield f"{words} make the weights smaller"
    if plan.engine == "vllm":
        yield "--max-model-len shortens sequences"
        if plan.place == "on the CPU":
            yield f"{CACHE_VARIABLE}=1 is the smallest cache"
            yield "--engine transformers takes 2 GiB less for its processes"
    else:
        yield "close other programs: the cache is made for the memory that is free"
