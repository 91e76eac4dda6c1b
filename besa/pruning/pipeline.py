"""Prunes a decoder block by block: `besa prune` and `besa.prune()`.

    from besa import PruneConfig, prune

    result = prune("path/to/model", PruneConfig(out="pruned", sparsity=0.5))
    print(result.sparsity, result.record.blocks[0].error)

For each block: load it, run it dense on the calibration stream, score its weights, choose the
masks, write the block out, run it pruned, and hand its output to the next block. The stream has
thus already gone through the pruned blocks, and a block's target is what the dense block makes of
that same stream.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from besa.data.texts import documents_from
from besa.data.windows import calibration_windows, token_stream
from besa.errors import BesaError
from besa.machine import give_memory_back
from besa.model.blocks import Linear, expert_count, find_linears
from besa.model.checkpoint import Checkpoint
from besa.model.finite import check_finite
from besa.model.loading import load_tokenizer, max_positions, pick_device
from besa.model.observe import observe
from besa.model.record import PruneRecord, write_record
from besa.model.replay import Call, capture
from besa.model.workspace import Workspace, check_free
from besa.progress import REPLAY, WRITTEN, Event, Tell
from besa.pruning.activations import Activations
from besa.pruning.config import PruneConfig
from besa.pruning.masked import Make, masked
from besa.pruning.methods import (
    Masks,
    besa_masks,
    magnitude_masks,
    sparsegpt_weights,
    wanda_masks,
)
from besa.pruning.record import block_record, linear_record, run_record, settings_of
from besa.pruning.scores import Hessians, InputNorms, wanda
from besa.report import model_card, render
from besa.writing import write_text

# Tokens that go through a block at once: enough to keep the cores busy, few enough to fit.
_BATCH_TOKENS = 512

# Windows to draw each sample from, where the text has so many: a long text is not read to its end.
_POOL = 16

# What to do when a block's numbers leave the range of the computation's dtype.
OVERFLOW = "try --dtype float32, or mend the checkpoint"

# The share of the batches on which a block's error is measured for the record.
_JUDGED = 8


@dataclass(frozen=True)
class PruneResult:
    """A finished run: where it is, and what besa.json there says."""

    out: Path
    record: PruneRecord

    @property
    def sparsity(self) -> float:
        """The achieved fraction of zeros over all pruned linears."""
        return self.record.sparsity.achieved


def prune(model: str | Path, config: PruneConfig, tell: Tell = lambda event: None) -> PruneResult:
    """Prunes a model on disk (or on the hub, when online) and writes it to `config.out`.

    Args:
        model: directory with config.json and safetensors, or a hub id.
        config: the settings.
        tell: is given every step's event (block, phase, loss, rate) for display.

    Raises:
        BesaError: something that the user can mend; what was finished stays in `OUT.partial`
            and the same call goes on from there.
    """
    started = time.monotonic()
    out = Path(config.out)
    check_free(out, config.overwrite)
    device = pick_device(config.device)
    checkpoint = Checkpoint.open(model)
    dtype = _dtype(config.dtype, device, checkpoint.dtype)
    plan = _plan(checkpoint, config)
    windows = _calibration(checkpoint, config)
    settings = settings_of(model, config, checkpoint, windows, device, dtype)
    with Workspace.open(out, settings, config.overwrite, checkpoint.nbytes) as workspace:
        run = _Run(checkpoint, config, plan, workspace, device, dtype, tell)
        with workspace.interruptible():
            shards = run.all_blocks(windows)
        record = run_record(checkpoint, settings, shards, time.monotonic() - started, device)
        workspace.write_index(shards)
        checkpoint.copy_companions(workspace.path)
        write_record(record, workspace.path)
        write_text(model_card(record), workspace.path / "README.md")
        write_text(render(record), workspace.path / "report.html")
        workspace.publish()
    return PruneResult(out, record)


@dataclass
class _Run:
    """One pass over the blocks."""

    checkpoint: Checkpoint
    config: PruneConfig
    plan: list[list[Linear]]
    workspace: Workspace
    device: torch.device
    dtype: torch.dtype
    tell: Tell

    @torch.no_grad()
    def all_blocks(self, windows: Tensor) -> list[dict[str, Any]]:
        """Prunes every block that is not finished yet; gives the records of all shards."""
        shards = [self._copy_others()]
        batches = windows.split(max(1, _BATCH_TOKENS // windows.shape[1]))
        with self.checkpoint.loaded_base() as base:
            hidden, calls = capture(base, list(self.checkpoint.blocks), batches)
        where = self.workspace.path if self.config.activations == "disk" else None
        stream = Activations.of(hidden, self.dtype, where, "stream")
        del hidden
        for index in range(len(self.plan)):
            row = self._on_device([batch[index] for batch in calls])
            name = f"block-{index:05d}"
            if (finished := self.workspace.finished(name)) is None:
                tensors, record = self._prune_block(index, stream, row)
                shard = self.workspace.shard(index + 2, len(self.plan) + 1)
                finished = self.workspace.finish(name, shard, tensors, {"record": record})
                self._event(index, WRITTEN, record=record)
            else:
                self._replay(index, finished, stream, row)
            shards.append(finished)
            give_memory_back()
        stream.close()
        return shards

    def _on_device(self, calls: list[Call]) -> list[Call]:
        """The calls on the device; batches that share one there share one here."""
        moved = {id(call): call.to(self.device, self.dtype) for call in calls}
        return [moved[id(call)] for call in calls]

    def _copy_others(self) -> dict[str, Any]:
        """The shard with all that belongs to no block: embedding, last norm, head."""
        finished = self.workspace.finished("others")
        if finished is None:
            shard = self.workspace.shard(1, len(self.plan) + 1)
            with self.checkpoint.other_tensors() as tensors:
                finished = self.workspace.finish("others", shard, tensors, {})
        return finished

    def _event(self, index: int, phase: str, **more: Any) -> None:
        event = Event(phase, block=index, blocks=len(self.plan), **more)
        if event.done == event.total:  # the log keeps ends of phases
            self.workspace.log(event.as_json())
        self.tell(event)

    def _hand_on(
        self, index: int, phase: str, block: nn.Module, stream: Activations, calls: list[Call]
    ) -> None:
        """Sends the stream through a pruned block."""
        for i, call in enumerate(calls):
            stream[i] = call.run(block, stream[i].to(self.device))
            check_finite(stream[i], f"the output of the pruned block {index}", OVERFLOW)
            self._event(index, phase, done=i + 1, total=len(calls))

    def _replay(
        self, index: int, finished: dict[str, Any], stream: Activations, calls: list[Call]
    ) -> None:
        """Goes through a block that an earlier run finished."""
        shard = self.workspace.path / finished["file"]
        stored = self.checkpoint.load_block(index, dict.fromkeys(finished["keys"], shard))
        block = copy.deepcopy(stored).to(self.device, self.dtype)
        self.checkpoint.unload_block(index)
        self._hand_on(index, REPLAY, block, stream, calls)

    def _prune_block(
        self, index: int, stream: Activations, calls: list[Call]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Prunes one block and sends the stream through it; gives its tensors and its record."""
        started = time.monotonic()
        name = f"{self.checkpoint.blocks_name}.{index}"
        linears = self.plan[index]
        stored = self.checkpoint.load_block(index)
        for own_name, value in stored.named_parameters():
            check_finite(value, f"{name}.{own_name}", "mend the checkpoint")
        block = copy.deepcopy(stored).to(self.device, self.dtype)

        learns = self.config.method == "besa"
        judged = calls[: max(1, len(calls) // _JUDGED)]
        dense = Activations.like(stream, len(calls if learns else judged), "dense")
        norms = InputNorms(linears, self.device)
        hessians = Hessians(linears if self.config.method == "sparsegpt" else [], self.device)

        def see(linear: Linear, group: int, inputs: Tensor) -> None:
            norms.add(linear, group, inputs)
            if hessians.sums:
                hessians.add(linear, group, inputs)

        with observe(block, linears, see):
            for i, call in enumerate(calls):
                output = call.run(block, stream[i].to(self.device))
                check_finite(output, f"the output of {name}", OVERFLOW)
                if i < len(dense):
                    dense[i] = output
                self._event(index, "statistics", done=i + 1, total=len(calls))

        rate, pattern = self.config.rate, self.config.pattern
        zeros = self._budget(index)
        weights = {x.name: x.matrix(block.get_parameter(x.parameter)) for x in linears}
        scored = {x.name: wanda(weights[x.name], norms.of(x)) for x in linears}
        uniform = wanda_masks(linears, scored, zeros, rate, pattern)
        own = {x.name: x.matrix(stored.get_parameter(x.parameter)) for x in linears}
        masks, updated = uniform, own
        losses: list[float] = []
        if self.config.method == "magnitude":
            masks = magnitude_masks(linears, weights, zeros, rate, pattern)
        elif self.config.method == "sparsegpt":
            masks, updated = sparsegpt_weights(linears, weights, hessians, zeros, rate, pattern)
        elif self.config.method == "besa" and linears:
            masks, losses = self._besa(index, block, weights, scored, stream, dense, calls, zeros)
        del scored

        error_wanda = None
        if masks is not uniform:
            self._put(block, linears, weights, uniform)
            error_wanda = self._error(block, judged, stream, dense)
        # What is stored is what is measured and handed on: rounded to the checkpoint's dtype.
        self._put(stored, linears, updated, masks)
        changed = {x.parameter: stored.get_parameter(x.parameter).data for x in linears}
        for linear in linears:
            parameter = block.get_parameter(linear.parameter)
            parameter.data = changed[linear.parameter].to(self.device, self.dtype)
        error = self._error(block, judged, stream, dense)
        self._hand_on(index, "hand on", block, stream, calls)
        dense.close()

        rows = [linear_record(x, changed[x.parameter], norms.unseen(x)) for x in linears]
        record = block_record(index, name, linears, rows)
        tensors = self.checkpoint.stored_tensors(index)
        self.checkpoint.unload_block(index)
        return tensors, {
            **record,
            "error": error,
            "error_wanda": error_wanda,
            "loss": losses,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _budget(self, index: int) -> int:
        """Zeros for a block, so that all blocks together have the target's to the weight."""
        sizes = [sum(x.size for x in linears) for linears in self.plan]
        before, upto = sum(sizes[:index]), sum(sizes[: index + 1])
        return round(self.config.rate * upto) - round(self.config.rate * before)

    def _put(
        self,
        block: nn.Module,
        linears: Sequence[Linear],
        weights: Mapping[str, Tensor],
        masks: Masks,
    ) -> None:
        """Puts masked weights into a block, in its own dtype and layout."""
        for linear in linears:
            parameter = block.get_parameter(linear.parameter)
            weight = weights[linear.name].to(parameter.device, parameter.dtype)
            kept = torch.where(masks[linear.name].to(parameter.device), weight, 0.0)
            parameter.data = linear.stored(kept, parameter).contiguous()

    def _error(
        self, block: nn.Module, calls: list[Call], stream: Activations, dense: Activations
    ) -> float:
        """||dense - pruned||^2 / ||dense||^2 over the given batches."""
        wrong = right = 0.0
        for i, call in enumerate(calls):
            target = dense[i].to(self.device).float()
            output = call.run(block, stream[i].to(self.device)).float()
            wrong += (output - target).square().sum().item()
            right += target.square().sum().item()
        return wrong / right if right else 0.0

    def _besa(
        self,
        index: int,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        scored: Mapping[str, Tensor],
        stream: Activations,
        dense: Activations,
        calls: list[Call],
        zeros: int,
    ) -> tuple[Masks, list[float]]:
        """Learned masks, and the mean loss of each epoch."""
        linears, epochs = self.plan[index], self.config.epochs
        losses: list[float] = []

        def forward(i: int, makes: Mapping[str, Sequence[Make]]) -> Tensor:
            with masked(block, linears, makes):
                return calls[i].run(block, stream[i].to(self.device))

        def tell(loss: float, rate: float) -> None:
            losses.append(loss)
            done, total = len(losses), epochs * len(calls)
            self._event(index, "learn", done=done, total=total, loss=loss, rate=rate)

        generator = torch.Generator().manual_seed(self.config.seed + index)
        masks = besa_masks(
            linears, weights, scored, zeros, self.config, forward, dense, generator, tell
        )
        return masks, torch.tensor(losses).view(epochs, -1).mean(1).tolist()


def _dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu" or stored == torch.float32:
        return torch.float32
    return torch.bfloat16  # float16 too: its range is too small for gradients


def _plan(checkpoint: Checkpoint, config: PruneConfig) -> list[list[Linear]]:
    """The linears to prune, block by block; everything that cannot be is refused here."""
    pattern = config.pattern
    experts = expert_count(checkpoint.config)
    plan = []
    for index, block in enumerate(checkpoint.blocks):
        name = f"{checkpoint.blocks_name}.{index}"
        linears = find_linears(block, name, experts, config.exclude)
        if config.include:
            linears = [x for x in linears if re.search(config.include, f"{name}.{x.name}")]
        for linear in linears:
            if pattern.m and linear.cols % pattern.m:
                raise BesaError(
                    f"{name}.{linear.name} has {linear.cols} inputs, which {pattern.m} does not "
                    f"divide: leave it dense with --exclude '{re.escape(linear.name)}', or "
                    "choose another pattern"
                )
        plan.append(linears)
    if not any(plan):
        if config.include or config.exclude:
            raise BesaError("--include and --exclude leave no linear to prune")
        kind = type(checkpoint.blocks[0]).__name__
        raise BesaError(f"{kind} has no linear that besa knows how to prune")
    return plan


def _calibration(checkpoint: Checkpoint, config: PruneConfig) -> Tensor:
    """Token windows [samples, seqlen]."""
    most = max_positions(checkpoint.directory) or 2048
    seqlen = config.seqlen or min(2048, most)
    if seqlen > most:
        raise BesaError(f"{checkpoint.directory} takes {most} tokens at once: lower --seqlen")
    tokenizer = load_tokenizer(checkpoint.directory)
    documents = documents_from(config.calibration, "calibration")
    stream = token_stream(tokenizer, documents, limit=_POOL * config.samples * seqlen)
    return calibration_windows(stream, config.samples, seqlen, config.seed)
