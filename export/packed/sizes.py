"""What packing saves when a model decodes: the bytes of weights that a token reads.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> linears = read_record(Path("path/to/sparse")).linears
>>> read = read_per_token(Checkpoint.open("path/to/pruned"), linears)
>>> print(f"decoding can become {read.speedup:.2f} times as fast, and no faster")
decoding can become ... times as fast, and no faster

A decoder at batch 1 reads every weight once for each token, and waits for memory: bytes are time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from besa.export.packable import expert_lists
from besa.model.blocks import expert_count, experts_per_token
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import PackedLinearRecord, ReadPerToken


def read_per_token(checkpoint: Checkpoint, linears: Sequence[PackedLinearRecord]) -> ReadPerToken:
    """Bytes of weights that one token reads, dense and packed: the blocks and the head.

    Of the experts only those count that a token is sent to. A token looks up one row of the
    embedding, which is nothing, unless the embedding is the head too.

    Args:
        checkpoint: the dense one.
        linears: those that are packed.
    """
    experts = expert_count(checkpoint.config)
    chosen = experts_per_token(checkpoint.config)
    share = chosen / experts if chosen and experts else 1.0
    dense = 0.0
    for block in checkpoint.blocks:
        routed = expert_lists(block, experts)
        for name, parameter in block.named_parameters():
            expert = name.startswith(routed) or (parameter.ndim == 3 and len(parameter) == experts)
            dense += parameter.numel() * (share if expert else 1.0)
    model: Any = checkpoint.model
    head = model.get_output_embeddings()
    if head is not None:
        dense += head.weight.numel()
    dense *= checkpoint.dtype.itemsize
    saved = sum(
        (linear.dense_bytes - linear.bytes) * (share if linear.expert else 1.0)
        for linear in linears
    )
    return ReadPerToken(
        dense_bytes=round(dense), packed_bytes=round(dense - saved), speedup=dense / (dense - saved)
    )
