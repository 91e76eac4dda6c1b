"""A model's shapes, from its config.json and from the headers of its weights if it has any.

>>> from besa.pruning.config import PruneConfig
>>> shape = shape_of(open_headers("path/to/model"), PruneConfig(out="pruned"))
>>> len(shape.blocks), shape.blocks[0].linears[0].name, shape.itemsize
(3, 'self_attn.q_proj', 4)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from besa.errors import BesaError
from besa.export.packable import expert_lists
from besa.model.architecture import read_config
from besa.model.blocks import expert_count, experts_per_token, find_linears
from besa.model.checkpoint import Checkpoint
from besa.model.files import resolve
from besa.model.json_files import read_object
from besa.model.quantization import check_floats, drop_notes
from besa.pruning.config import PruneConfig
from besa.pruning.plan import plan_of


@dataclass(frozen=True)
class LinearShape:
    """A weight of a block: `groups` matrices of `rows` outputs by `cols` inputs.

    Attributes:
        name: within the block.
        share: the part of the tokens that each group reads; below 1 for routed experts.
        pruned: whether the run prunes it.
    """

    name: str
    groups: int
    rows: int
    cols: int
    share: float = 1.0
    pruned: bool = True

    @property
    def size(self) -> int:
        return self.groups * self.rows * self.cols

    @property
    def uses(self) -> float:
        """How often a token goes through a matrix of it: 1, or as many experts as it chooses."""
        return self.groups * self.share


@dataclass(frozen=True)
class BlockShape:
    """A decoder block.

    Attributes:
        linears: its matrices, in the order in which the block defines them.
        parameters: all its numbers: those of the linears, of norms, routers and the rest.
    """

    linears: tuple[LinearShape, ...]
    parameters: int

    @property
    def pruned(self) -> tuple[LinearShape, ...]:
        return tuple(linear for linear in self.linears if linear.pruned)

    @property
    def prunable(self) -> int:
        """How many weights the run prunes from."""
        return sum(linear.size for linear in self.pruned)

    @property
    def largest(self) -> int:
        """Weights of the largest matrix that the run prunes."""
        return max((linear.rows * linear.cols for linear in self.pruned), default=0)

    @property
    def levels(self) -> tuple[tuple[LinearShape, ...], ...]:
        """The linears by who reads whose output, as `besa.pruning.levels` finds them by running.

        Of a part of the block (attention, MLP, experts), the last linear reads what the others
        gave. So it is in Llama and its descendants.
        """
        parts: dict[str, list[LinearShape]] = {}
        for linear in self.linears:
            parts.setdefault(linear.name.rpartition(".")[0], []).append(linear)
        levels: list[tuple[LinearShape, ...]] = []
        for part in parts.values():
            levels += [tuple(part[:-1]), tuple(part[-1:])] if len(part) > 1 else [tuple(part)]
        return tuple(levels)


@dataclass(frozen=True)
class Attention:
    """What of attention costs time and memory beside its linears.

    Attributes:
        width: numbers in the queries of a token, over all heads.
        kept: numbers in the keys and values of a token, over their heads.
        heads: of the queries.
        window: tokens that a token looks back at most; None: all.
        eager: whether the probabilities of all pairs of tokens exist at once.
    """

    width: int
    kept: int
    heads: int
    window: int | None = None
    eager: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        name: how people call it, the directory's name.
        width: numbers in the hidden state of a token.
        embedding: numbers outside of the blocks that are loaded to embed tokens.
        others: all numbers outside of the blocks, each once: embedding, last norm, head.
        itemsize: bytes of a stored number.
        nbytes: of its weight files; None where it has none.
        weights: a weight file; None where it has none.
        tokenizer: bytes of tokenizer.json, 0 without one.
    """

    name: str
    blocks: tuple[BlockShape, ...]
    attention: Attention
    width: int
    embedding: int
    others: int
    dtype: torch.dtype
    nbytes: int | None
    weights: Path | None
    tokenizer: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def parameters(self) -> int:
        return self.others + sum(block.parameters for block in self.blocks)

    @property
    def stored_bytes(self) -> int:
        """Of all weights in files."""
        return self.nbytes or self.parameters * self.itemsize


def open_headers(
    model: str | Path, trust_remote_code: bool = False, *, packed: bool = False
) -> Checkpoint:
    """A checkpoint whose weights need not be there: then it has no files.

    Args:
        packed: whether the weights may be stored as anything but floats; such files are not read.

    Raises:
        BesaError: no config.json, or what `Checkpoint.open` raises.
    """
    directory = resolve(model)
    if quantized_as(directory) is None:
        packed = False
    if not packed and any(directory.glob("*.safetensors*")):
        return Checkpoint.open(directory, trust_remote_code)
    config = read_config(directory, trust_remote_code)
    if packed:
        drop_notes(config)
    check_floats(directory, config)
    named = getattr(config.get_text_config(), "dtype", None)
    dtype = named if isinstance(named, torch.dtype) else torch.bfloat16
    return Checkpoint.of(directory, config, {}, trust_remote_code, dtype)


def quantized_as(model: str | Path) -> str | None:
    """The method that a model's config.json says its weights are stored by; None for floats."""
    try:
        raw = read_object(resolve(model) / "config.json")
        method = (raw.get("quantization_config") or {}).get("quant_method")
    except (BesaError, AttributeError):
        return None  # what is wrong with it, `read_config` says
    return method if isinstance(method, str) else None


def shape_of(checkpoint: Checkpoint, config: PruneConfig | None = None) -> ModelShape:
    """The shapes of a model.

    Args:
        config: says which linears are pruned; None: all that can be.

    Raises:
        BesaError: what is to be pruned cannot be.
    """
    if config is None:
        config = PruneConfig(out=".")
    pruned = [{linear.name for linear in linears} for linears in plan_of(checkpoint, config)]
    blocks = [
        _block_shape(checkpoint, index, block, pruned[index])
        for index, block in enumerate(checkpoint.blocks)
    ]
    inside = checkpoint.blocks_name + "."
    base = checkpoint.blocks_name.split(".")[0] + "."
    tied = set(getattr(checkpoint.model, "all_tied_weights_keys", ()))
    outside = [
        (name, parameter.numel())
        for name, parameter in checkpoint.model.named_parameters()
        if not name.startswith(inside) and name not in tied
    ]
    text = checkpoint.config.get_text_config()
    files = sorted(set(checkpoint.files.values()))
    tokenizer = checkpoint.directory / "tokenizer.json"
    return ModelShape(
        name=checkpoint.directory.resolve().name,
        blocks=tuple(blocks),
        attention=attention_of(text),
        width=int(text.hidden_size),
        embedding=sum(size for name, size in outside if name.startswith(base)),
        others=sum(size for _, size in outside),
        dtype=checkpoint.dtype,
        nbytes=checkpoint.nbytes if files else None,
        weights=max(files, key=lambda path: path.stat().st_size) if files else None,
        tokenizer=tokenizer.stat().st_size if tokenizer.is_file() else 0,
    )


def attention_of(text: Any) -> Attention:
    """What a text config says of attention; zeros where a model has none."""
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    size = int(getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0))
    kept = int(getattr(text, "num_key_value_heads", None) or heads)
    kinds = getattr(text, "layer_types", None) or ()
    window = getattr(text, "sliding_window", None)
    only = bool(kinds) and all(kind == "sliding_attention" for kind in kinds)
    eager = getattr(text, "_attn_implementation", None) == "eager"
    return Attention(heads * size, 2 * kept * size, heads, window if only else None, eager)


def _block_shape(
    checkpoint: Checkpoint, index: int, block: nn.Module, pruned: Collection[str]
) -> BlockShape:
    experts = expert_count(checkpoint.config)
    chosen = experts_per_token(checkpoint.config)
    share = chosen / experts if experts and chosen else 1.0
    lists = expert_lists(block, experts)
    linears = [
        LinearShape(
            name=linear.name,
            groups=linear.groups,
            rows=linear.rows,
            cols=linear.cols,
            share=share
            if linear.name.startswith(lists)
            or (linear.groups == experts and block.get_parameter(linear.parameter).ndim == 3)
            else 1.0,
            pruned=linear.name in pruned,
        )
        for linear in find_linears(
            block, f"{checkpoint.blocks_name}.{index}", experts, strict=False
        )
    ]
    return BlockShape(tuple(linears), sum(p.numel() for p in block.parameters()))
