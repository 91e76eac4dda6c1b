"""Prunes a decoder block by block.

>>> result = prune_blocks("path/to/model", PruneConfig(out="pruned", samples=4, seqlen=32))
>>> result.sparsity, len(result.record.blocks)
(0.5, 3)

For each block: load it, run it dense on the calibration stream, let the method choose what goes
and an update make up for it, put what is left into the block, measure it, and hand its output to
the next block. The stream has thus already gone through the pruned blocks. A block's target is what
the dense block makes of that same stream, or with a dense teacher its output in the dense model,
for which a second stream goes through the dense blocks.

Of several processes (`besa.processes.ranks`) each has a part of the samples, and all of them have
the block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from besa.data.samples import draw_samples
from besa.machine import give_memory_back
from besa.model.ahead import LoadAhead
from besa.model.blocks import Linear
from besa.model.checkpoint import Checkpoint
from besa.model.conditions import check_alike, resumable
from besa.model.finite import FiniteCheck, check_finite
from besa.model.loading import computing_dtype, fitting_in_memory, pick_device
from besa.model.observe import observe
from besa.model.prune_record import BlockRecord, BlockUpdate, PruneRecord
from besa.model.record import read_record
from besa.model.replay import Call, capture, on_device
from besa.model.workspace import Workspace
from besa.processes.ranks import ALONE, Ranks
from besa.progress import REPLAY, WRITTEN, Event, Tell
from besa.pruning import methods, updates
from besa.pruning.activations import Activations
from besa.pruning.batches import Groups, batches_of
from besa.pruning.block_run import BlockRun, Pruned, copy_to
from besa.pruning.budget import Budget, budgets
from besa.pruning.config import PruneConfig
from besa.pruning.dense_blocks import check_experts
from besa.pruning.expert_tokens import SPARE, feeding, routed_tokens
from besa.pruning.guard import guarded, held_out_of
from besa.pruning.learn import Step
from besa.pruning.methods import wanda
from besa.pruning.model_copy import ModelCopy
from besa.pruning.plan import plan_of
from besa.pruning.record import block_record, run_record, settings_of
from besa.pruning.shared import borrows, later_uses
from besa.pruning.sharing import warn_of_idle
from besa.pruning.streams import Streams
from besa.pruning.transfers import copies_for
from besa.report.pages import write_pages
from besa.typed_json import from_json, to_json

# What to do when a block's numbers leave the range of the computation's dtype.
_OVERFLOW = "try --dtype float32, or mend the checkpoint"


@dataclass(frozen=True)
class PruneResult:
    """A finished run: where it is, and what besa.json there says."""

    out: Path
    record: PruneRecord

    @property
    def sparsity(self) -> float:
        """The achieved fraction of zeros over all pruned linears."""
        return self.record.sparsity.achieved


def prune_blocks(
    model: str | Path,
    config: PruneConfig,
    tell: Tell = lambda event: None,
    *,
    may_be_there: bool = False,
    dropped: ModelCopy | None = None,
    rotated: ModelCopy | None = None,
    ranks: Ranks = ALONE,
) -> PruneResult:
    """Prunes a model on disk (or on the hub, when online) and writes it to `config.out`.

    Args:
        model: directory with config.json and safetensors, or a hub id.
        config: the settings.
        tell: is given every step's event for display.
        may_be_there: what the same settings gave before is taken as it is.
        dropped, rotated: copies of the model with fewer experts, and rotated; the last one is
            pruned in its place.
        ranks: the processes that share the samples.

    Raises:
        BesaError: something that the user can mend; what was finished stays in `OUT.partial`
            and the same call goes on from there.
    """
    started = time.monotonic()
    out = Path(config.out)
    device = pick_device(ranks.device(config.device))
    copy = rotated or dropped
    checkpoint = Checkpoint.open(copy.directory if copy else model, config.trust_remote_code)
    dtype = computing_dtype(config.dtype, device, checkpoint.dtype)
    plan = plan_of(checkpoint, config)
    if config.expert_tokens:
        check_experts(checkpoint, "--expert-tokens")
    spare = SPARE if config.expert_tokens else 0
    windows = draw_samples(checkpoint, config.calibration, config, spare)
    settings = settings_of(model, config, checkpoint, windows, device, dtype)
    if may_be_there and (found := _made_before(out, settings)):
        return found
    check_alike(settings, ranks)
    to_resume = resumable(settings)
    with Workspace.open(out, to_resume, config.overwrite, checkpoint.nbytes, ranks) as workspace:
        pipeline = _Pipeline(checkpoint, config, plan, workspace, device, dtype, tell, ranks)
        too_large = "a block and its calibration samples"
        remedy = "lower --seqlen, or give --device cpu"
        with workspace.interruptible(), fitting_in_memory(too_large, remedy):
            shards = pipeline.all_blocks(windows)
        seconds = time.monotonic() - started

        def publish() -> PruneRecord:
            copies = dropped, rotated
            record = run_record(
                checkpoint, settings, shards, seconds, device, *copies, processes=ranks.size
            )
            workspace.write_index(shards)
            checkpoint.copy_companions(workspace.path)
            write_pages(record, workspace.path)
            workspace.publish()
            return record

        return PruneResult(out, ranks.from_leader(publish))


def _made_before(out: Path, settings: Mapping[str, Any]) -> PruneResult | None:
    """What a finished run with these settings left; None if there is none."""
    record = read_record(out)
    if isinstance(record, PruneRecord) and record.settings == json.loads(json.dumps(settings)):
        return PruneResult(out, record)
    return None


def _loads_ahead(device: torch.device) -> bool:
    """A CPU that prunes has neither time to load meanwhile nor memory for a second block."""
    return device.type != "cpu"


@dataclass
class _Pipeline:
    """One pass over the blocks.

    Attributes:
        groups: which batches belong together, in a step of learning or held out.
        chosen: the updates of the blocks so far, where held-out windows chose them.
        calls: how the model calls its blocks, `calls[batch][block]`.
        files: where each tensor is now, of what blocks share the pruned one.
    """

    checkpoint: Checkpoint
    config: PruneConfig
    plan: list[list[Linear]]
    workspace: Workspace
    device: torch.device
    dtype: torch.dtype
    tell: Tell
    ranks: Ranks
    groups: Groups = field(init=False)
    chosen: list[BlockUpdate] = field(init=False, default_factory=list)
    calls: list[list[Call]] = field(init=False, default_factory=list)
    files: dict[str, Path] = field(init=False)
    loading: LoadAhead = field(init=False)

    def __post_init__(self) -> None:
        self.files = dict(self.checkpoint.files)
        self.loading = LoadAhead(self._load)

    @torch.no_grad()
    def all_blocks(self, windows: Tensor) -> list[dict[str, Any]]:
        """Prunes every block that is not finished yet; gives the records of all shards."""
        shards = [self._copy_others()]
        windows = self._samples(windows)
        step, held_out = self.config.step_samples, held_out_of(self.config)
        batches, self.groups = batches_of(windows, held_out, step, self.ranks)
        warn_of_idle(self.config, windows.shape[1], self.ranks)
        with self.checkpoint.loaded_base() as base:
            hidden, self.calls = capture(base, list(self.checkpoint.blocks), batches)
        streams = self._streams(hidden)
        del hidden
        with self.loading:
            for index in range(len(self.plan)):
                shards.append(self._finish_block(index, streams, self._calls_of(index)))
                give_memory_back()
        streams.close()
        return shards

    def _samples(self, windows: Tensor) -> Tensor:
        """The samples, and of the spare windows those that experts without enough tokens need."""
        count, wanted = self.config.sample_count, self.config.expert_tokens
        if wanted is None:
            return windows
        seen = count - held_out_of(self.config)
        candidates = torch.cat([windows[:seen], windows[count:]])
        added = self.workspace.remembered("added-samples")
        if added is None:
            where = self.dtype, self.device, self._activations
            own = candidates.tensor_split(self.ranks.size)[self.ranks.rank]
            counted = routed_tokens(self.checkpoint, own, *where, self._counted)
            tokens = torch.cat(self.ranks.gather(counted))
            added = self.workspace.remember("added-samples", feeding(tokens, seen, wanted))
        return torch.cat([candidates[[*range(seen), *added]], windows[seen:count]])

    def _counted(self, index: int) -> None:
        blocks = len(self.plan)
        self.tell(Event("counting", index + 1, blocks, what="the tokens of each expert"))

    @property
    def _activations(self) -> Path | None:
        """Where activations go; None: they stay in memory."""
        return self.workspace.path if self.config.activations == "disk" else None

    def _streams(self, hidden: list[Tensor]) -> Streams:
        """What enters the first block, and room for its targets."""
        directory = self._activations

        def copied(name: str) -> Activations:
            return Activations.of(hidden, self.dtype, directory, name, copies_for(self.device))

        pruned = copied("stream")
        dense = copied("dense") if self.config.teacher == "dense" else None
        some = dense is None and not methods.load(self.config.method).targets
        count = max(1, self.groups.measured) if some else len(pruned)
        targets = Activations.like(pruned, count, "targets")
        return Streams(pruned, dense, targets)

    def _finish_block(self, index: int, streams: Streams, calls: list[Call]) -> dict[str, Any]:
        """Prunes and writes a block, unless an earlier run did; gives its shard's record."""
        name = f"block-{index:05d}"
        finished = self.workspace.finished(name)
        if finished is None:
            record = self._prune_block(index, streams, calls)
            shard = self.workspace.shard(index + 2, len(self.plan) + 1)
            tensors = partial(self.checkpoint.stored_tensors, index)
            finished = self.workspace.finish(name, shard, tensors, {"record": to_json(record)})
            self.checkpoint.unload_block(index)
            self._event(index, WRITTEN, record=record)
        else:
            self._replay(index, finished, streams, calls)
        streams.advance_dense()
        lent = set(finished["keys"]) & set(self.checkpoint.borrowed.values())
        self.files |= dict.fromkeys(lent, self.workspace.path / finished["file"])
        block: BlockRecord = from_json(BlockRecord, finished["record"])
        if block.update is not None:
            self.chosen.append(block.update)
        return finished

    def _calls_of(self, index: int) -> list[Call]:
        return on_device(self.calls, index, self.device, self.dtype)

    def _copy_others(self) -> dict[str, Any]:
        """The shard with all that belongs to no block: embedding, last norm, head."""
        finished = self.workspace.finished("others")
        if finished is None:
            shard = self.workspace.shard(1, len(self.plan) + 1)
            with self.checkpoint.other_tensors() as tensors:
                finished = self.workspace.finish("others", shard, tensors, {})
        return finished

    def _prune_block(self, index: int, streams: Streams, calls: list[Call]) -> BlockRecord:
        """Prunes one block, which stays loaded, and sends the stream through it."""
        started = time.monotonic()
        method, linears = methods.load(self.config.method), self.plan[index]
        budget = budgets(self.plan, self.config)[index]
        measured = self.groups.measured
        run = self._block_run(index, self._take(index), linears, streams, calls)
        self._observe(index, run, streams, method.hessians)
        pruned, update = self._updated(index, run, streams, method.mask(run, budget), budget)
        pruned = run.agreed(pruned)

        error_wanda = None
        if linears and self.config.method != "wanda":
            run.put(wanda.mask(run, budget))
            error_wanda = run.error(measured)
        run.put(pruned)
        error = run.error(measured)
        self._hand_on(index, "hand on", run, streams)

        return block_record(
            index,
            self._name(index),
            run,
            masks=pruned.masks,
            losses=pruned.losses,
            error=error,
            error_wanda=error_wanda,
            seconds=time.monotonic() - started,
            update=update,
        )

    def _updated(
        self, index: int, run: BlockRun, streams: Streams, pruned: Pruned, budget: Budget
    ) -> tuple[Pruned, BlockUpdate | None]:
        """The masks with the weights that they keep updated, and how that was chosen."""
        if streams.dense is not None:
            run.use(run.weights)
            self._send(index, "teacher", run, streams.dense, streams.targets, self._name(index))
        kind = self.config.update
        assert kind is not None  # its default depends on the method
        if kind == "none" or not run.linears or later_uses(self.checkpoint, index, run.linears):
            return pruned, None  # what suits one use of shared weights may not suit the others
        if kind in ("auto", "learn"):
            if not self.groups.held_out:
                return pruned, None
            learned_choice = self.config.method == "besa" and bool(self.config.pattern.m)
            others = {"wanda": wanda.mask(run, budget)} if learned_choice else None
            return guarded(run, pruned, self.chosen, kind == "auto", others)
        return updates.updated(run, pruned, updates.load(kind)), None

    def _take(self, index: int) -> nn.Module:
        """A loaded block, while the next one begins to load."""
        block = self.loading.take(index)
        following = index + 1
        ahead = _loads_ahead(self.device) and following < len(self.plan)
        if ahead and not borrows(self.checkpoint, following):  # what is not pruned yet
            self.loading.begin(following)
        return block

    @torch.no_grad()  # threads do not inherit it
    def _load(self, index: int) -> nn.Module:
        """A block as the checkpoint has it, without NaN or Inf."""
        block = self.checkpoint.load_block(index, self.files)
        for parameter, value in block.named_parameters():
            check_finite(value, f"{self._name(index)}.{parameter}", "mend the checkpoint")
        return block

    def _block_run(
        self,
        index: int,
        stored: nn.Module,
        linears: Sequence[Linear],
        streams: Streams,
        calls: list[Call],
    ) -> BlockRun:
        def on_step(step: Step) -> None:
            self._event(
                index, "learn", done=step.done, total=step.total, loss=step.loss, rate=step.rate
            )

        return BlockRun(
            stored=stored,
            linears=linears,
            calls=calls,
            stream=streams.pruned,
            dense_stream=streams.dense,
            targets=streams.targets,
            groups=self.groups,
            ranks=self.ranks,
            device=self.device,
            dtype=self.dtype,
            config=self.config,
            generator=torch.Generator().manual_seed(self.config.seed + index),
            on_step=on_step,
        )

    def _observe(self, index: int, run: BlockRun, streams: Streams, hessians: bool) -> None:
        """Runs the dense block: gathers its inputs' statistics, and its outputs as targets."""

        check = FiniteCheck(f"the output of {self._name(index)}", _OVERFLOW)
        targets = streams.targets

        def on_output(i: int, output: Tensor) -> None:
            check.add(output)
            if i < len(targets):
                targets[i] = output
            self._event(index, "statistics", done=i + 1, total=len(run.calls))

        run.observe(hessians, on_output)
        check.finish()
        if uses := later_uses(self.checkpoint, index, run.linears):
            self._observe_later(index, run, uses)
        run.share_statistics()

    def _observe_later(
        self, index: int, run: BlockRun, uses: Mapping[int, Mapping[Linear, Linear]]
    ) -> None:
        """Adds what the block's linears read where later blocks use them, in the dense model."""
        self.loading.drop()
        hidden = [run.output(i).cpu() for i in range(run.seen)]
        for later in range(index + 1, max(uses) + 1):
            block = copy_to(self._load(later), self.device, self.dtype)
            calls, pairs = self._calls_of(later), uses.get(later, {})

            def add(
                linear: Linear,
                group: int,
                inputs: Tensor,
                pairs: Mapping[Linear, Linear] = pairs,
            ) -> None:
                run.add_inputs(pairs[linear], group, inputs)

            with observe(block, list(pairs), add):
                hidden = [
                    call.run(block, x.to(self.device)).cpu()
                    for call, x in zip(calls, hidden, strict=False)
                ]
            self.checkpoint.unload_block(later)

    def _hand_on(self, index: int, phase: str, run: BlockRun, streams: Streams) -> None:
        """Sends the stream through a pruned block."""
        what = f"the pruned block {index}"
        self._send(index, phase, run, streams.pruned, streams.pruned, what)

    def _send(
        self,
        index: int,
        phase: str,
        run: BlockRun,
        source: Activations,
        place: Activations,
        what: str,
    ) -> None:
        """Sends activations through the block as it is, to their place behind it."""
        check = FiniteCheck(f"the output of {what}", _OVERFLOW)
        source.expect(range(len(source)))
        for i in range(len(source)):
            place[i] = output = run.output_of(i, source[i])
            check.add(output)
            self._event(index, phase, done=i + 1, total=len(source))
        check.finish()

    def _replay(
        self, index: int, finished: dict[str, Any], streams: Streams, calls: list[Call]
    ) -> None:
        """Sends the streams through a block that an earlier run finished."""
        self.loading.drop()  # an earlier run may have finished blocks that follow unfinished ones
        if streams.dense is not None:
            run = self._block_run(index, self._load(index), [], streams, calls)
            self._send(index, "teacher", run, streams.dense, streams.targets, self._name(index))
        shard = self.workspace.path / finished["file"]
        own = dict.fromkeys(finished["keys"], shard)
        stored = self.checkpoint.load_block(index, {**self.files, **own})
        run = self._block_run(index, stored, [], streams, calls)
        self.checkpoint.unload_block(index)
        self._hand_on(index, REPLAY, run, streams)

    def _name(self, index: int) -> str:
        """A block's name in the model: "model.layers.0"."""
        return f"{self.checkpoint.blocks_name}.{index}"

    def _event(self, index: int, phase: str, **more: Any) -> None:
        """Tells of a step in a block; the log keeps the ends of phases."""
        event = Event(phase, block=index, blocks=len(self.plan), **more)
        if event.done == event.total:
            self.workspace.log(event.as_json())
        self.tell(event)
