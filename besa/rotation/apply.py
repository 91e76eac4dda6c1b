"""Rotates a model in place, and sees whether its function is still the same.

>>> from transformers import AutoModelForCausalLM
>>> from besa.rotation.structure import structure_of
>>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
>>> tokens, structure = torch.arange(8).unsqueeze(0), structure_of(model)
>>> before = model(tokens).logits
>>> fold_gains(model, structure.sites)
>>> rotate_stream(model, structure, random_rotation(structure.width, seed=0))
>>> bool((model(tokens).logits - before).abs().max() < 1e-4)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from besa.rotation.structure import Heads, Site, Structure


def random_rotation(width: int, seed: int, groups: int = 0) -> Tensor:
    """An orthogonal matrix float32 [width, width], or `groups` of them."""
    shape = (groups, width, width) if groups else (width, width)
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(shape, generator=generator))[0]


def gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies its scaled inputs with, float32 [width]."""
    weight = norm.get_parameter("weight")
    return norm(torch.ones(1, 1, len(weight), device=weight.device)).flatten().float()


@torch.no_grad()
def fold_gains(model: nn.Module, sites: Sequence[Site]) -> None:
    """Multiplies what reads a norm with the norm's gain, which then only scales."""
    for site in sites:
        norm = model.get_submodule(site.norm)
        scale = gain(norm)
        for reader in site.readers:
            reader.of(model).mul_(scale)
        norm.get_parameter("weight").fill_(site.neutral)


@torch.no_grad()
def rotate_stream(model: Any, structure: Structure, rotation: Tensor) -> None:
    """The residual stream x becomes x Q; gains must be folded."""
    embedding = model.get_input_embeddings().weight
    rotation = rotation.to(embedding.device)
    embedding.copy_(embedding @ rotation)
    for site in structure.sites:
        for reader in site.readers:
            weight = reader.of(model)
            weight.copy_(weight @ rotation)
    for writer in structure.writers:
        weight, bias = writer.of(model), writer.bias(model)
        weight.copy_(rotation.T @ weight)
        if bias is not None:
            bias.copy_(bias @ rotation)


@torch.no_grad()
def rotate_heads(model: nn.Module, heads: Heads, rotations: Tensor) -> None:
    """The values v of a head become v R, and the output projection undoes it.

    Args:
        rotations: [heads of values, size, size].
    """
    value, output = heads.value.of(model), heads.output.of(model)
    rotations = rotations.to(value.device)
    parts = value.unflatten(0, (-1, heads.size))
    value.copy_((rotations.mT @ parts).flatten(0, 1))
    bias = heads.value.bias(model)
    if bias is not None:
        rows = bias.unflatten(0, (-1, 1, heads.size))
        bias.copy_((rows @ rotations).flatten())
    columns = output.unflatten(1, (-1, heads.size)).transpose(0, 1)  # [heads, width, size]
    shared = rotations.repeat_interleave(len(columns) // len(rotations), 0)
    output.copy_((columns @ shared).transpose(0, 1).flatten(1))


def values_in(model: nn.Module, heads: Heads) -> int:
    """How many heads of values there are."""
    return heads.value.of(model).shape[0] // heads.size
