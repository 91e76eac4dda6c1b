"""The copy of a model without the experts that carry least (`--drop-experts`), pruned in its place.

Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv
2510.13999: an expert's saliency is the mean, over the tokens that its router sends there, of its
weight times the norm of its output. Those of the least saliency go, as many in each layer, and the
rows of the router with them; tokens then go to the next best expert.

Where a router first chooses among groups of experts, each group loses as many.

>>> least(torch.tensor([0.3, 0.1, 0.8, 0.9]), 2)
[0, 1]
>>> least(torch.tensor([0.3, 0.1, 0.8, 0.9]), 2, groups=2)  # one of each
[1, 2]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from besa.data.samples import draw_samples, samples_digest
from besa.errors import BesaError
from besa.model.blocks import expert_count
from besa.model.checkpoint import Checkpoint
from besa.model.fewer_experts import cannot_drop, fewer_in_config, tensors_with
from besa.model.json_files import read_object
from besa.model.loading import computing_dtype, fitting_in_memory, pick_device
from besa.model.routing import Routed, Stack
from besa.model.workspace import Workspace
from besa.progress import Event, Tell
from besa.pruning.batches import batches_of
from besa.pruning.config import PruneConfig
from besa.pruning.dense_blocks import check_experts, dense_blocks
from besa.pruning.model_copy import ModelCopy, left_copy, sign
from besa.version import __version__
from besa.writing import write_text


class Saliency:
    """What the experts of one stack carry.

    Attributes:
        sums: of router weight times norm of the output, float64 [experts].
        tokens: that were routed to each, int64 [experts].
        chosen: how many experts a token chooses.
    """

    def __init__(self, experts: int, chosen: int) -> None:
        self.sums = torch.zeros(experts, dtype=torch.float64)
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.chosen = chosen

    def add(self, routed: Routed) -> None:
        """Adds the tokens of one call."""
        tokens = routed.counts()[0].cpu()
        self.tokens += tokens
        for expert in tokens.nonzero().flatten().tolist():
            output = routed.of(expert).output()  # its weight is in it
            self.sums[expert] += float(output.float().norm(dim=1).sum())

    def of(self) -> Tensor:
        """The mean over an expert's tokens, float64 [experts]; 0 where there are none."""
        return self.sums / self.tokens.clamp_min(1)


def least(saliency: Tensor, count: int, groups: int = 1) -> list[int]:
    """The `count` experts of the least saliency [experts], as many of each group, in order."""
    by_group = saliency.view(groups, -1)
    lowest = by_group.argsort(dim=1, stable=True)[:, : count // groups]
    offsets = torch.arange(groups).unsqueeze(1) * by_group.shape[1]
    return sorted((lowest + offsets).flatten().tolist())


def dropped_copy(
    model: str | Path, config: PruneConfig, tell: Tell = lambda event: None
) -> ModelCopy:
    """Makes the copy, or finds what an interrupted run left.

    Raises:
        BesaError: the experts cannot be dropped, or something else is in the copy's place.
    """
    assert config.drop_experts is not None
    checkpoint = Checkpoint.open(model, config.trust_remote_code)
    check_experts(checkpoint, "--drop-experts")
    device = pick_device(config.device)
    dtype = computing_dtype(config.dtype, device, checkpoint.dtype)
    windows = draw_samples(checkpoint, config.calibration, config)
    made_of = {
        "model": checkpoint.fingerprint(),
        "text": samples_digest(windows),
        "drop_experts": config.drop_experts,
        "dtype": str(dtype),
        "besa": __version__,
    }
    words = f"of the experts of each layer, {config.drop_experts} that carried least were dropped"
    out = Path(config.out)
    directory = out.with_name(out.name + ".dropped")
    if (left := left_copy(directory, made_of)) is not None:
        return left
    saliency: dict[tuple[int, str], Saliency] = {}

    def on_routed(block: int, _: int, routed: Routed) -> None:
        new = Saliency(routed.stack.count, routed.ids.shape[1])
        saliency.setdefault((block, routed.stack.name), new).add(routed)

    dropped: dict[str, tuple[int, ...]] = {}
    batches, _ = batches_of(windows)
    blocks = len(checkpoint.blocks)

    def without(index: int, stacks: Sequence[Stack]) -> dict[str, Tensor]:
        kept = {}
        for stack in stacks:
            gone = _gone(checkpoint, stack, saliency.get((index, stack.name)), config)
            dropped[f"{checkpoint.blocks_name}.{index}.{stack.name}"] = tuple(gone)
            kept[stack] = [x for x in range(stack.count) if x not in gone]
        return tensors_with(checkpoint, index, kept)

    too_large, remedy = "a block and its calibration samples", "lower --seqlen or --samples"
    with Workspace.open(directory, made_of, True, checkpoint.nbytes) as workspace:
        try:
            with workspace.interruptible(), fitting_in_memory(too_large, remedy):
                with checkpoint.other_tensors() as tensors:
                    shard = workspace.shard(1, blocks + 1)
                    shards = [workspace.finish("others", shard, tensors, {})]
                passed = dense_blocks(checkpoint, batches, dtype, on_routed, device)
                for index, stacks in enumerate(passed):
                    shard = workspace.shard(index + 2, blocks + 1)
                    name, tensors = f"block-{index:05d}", without(index, stacks)
                    shards.append(workspace.finish(name, shard, tensors, {}))
                    tell(Event("dropping", index + 1, blocks, what="experts that carry least"))
            workspace.write_index(shards)
            checkpoint.copy_companions(workspace.path)
            _write_config(checkpoint, workspace.path, config.drop_experts)
        except BesaError:
            workspace.abandon()
            raise
        sign(workspace.path, made_of, words, dropped)
        workspace.publish()
    return ModelCopy(directory, words, dropped)


def _gone(
    checkpoint: Checkpoint, stack: Stack, saliency: Saliency | None, config: PruneConfig
) -> list[int]:
    """Which experts of a stack go.

    Raises:
        BesaError: they cannot.
    """
    count = config.drop_experts
    assert count is not None
    text = checkpoint.config.get_text_config()
    groups = getattr(text, "n_group", None) or 1
    left = stack.count - count
    if saliency is None:
        raise cannot_drop(checkpoint, f"{stack.name} is not told which tokens go where")
    if stack.count != expert_count(checkpoint.config):
        raise cannot_drop(
            checkpoint,
            f"{stack.name} holds {stack.count}, and config.json says otherwise",
        )
    if count % groups:
        raise BesaError(f"experts are in {groups} groups: give --drop-experts a multiple of it")
    # Of a group the two best experts speak for it, and not all groups are asked.
    reached = left // groups * (getattr(text, "topk_group", None) or 1) if groups > 1 else left
    if reached < saliency.chosen or (groups > 1 and left // groups < 2):
        raise BesaError(
            f"--drop-experts {count} of {stack.count} leaves too few for the {saliency.chosen} "
            "that each token chooses"
        )
    return least(saliency.of(), count, groups)


def _write_config(checkpoint: Checkpoint, directory: Path, dropped: int) -> None:
    """Changes the number of experts in config.json.

    Raises:
        BesaError: that is no model then.
    """
    path = directory / "config.json"
    count = expert_count(checkpoint.config)
    assert count is not None
    config = fewer_in_config(read_object(path), count, count - dropped)
    write_text(json.dumps(config, indent=2) + "\n", path)
    try:
        copy = Checkpoint.open(directory, checkpoint.trust_remote_code)
    except BesaError as error:
        reason = str(error).removeprefix(f"{directory}: ")
        raise cannot_drop(checkpoint, f"without them {reason}") from None
    if expert_count(copy.config) != count - dropped:
        raise cannot_drop(checkpoint, "config.json does not say how many there are")
