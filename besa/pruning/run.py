"""A whole run, as much as the effort asks for: `besa prune` and `besa.prune()`.

>>> result = prune("path/to/model", PruneConfig(out="pruned", samples=8, seqlen=32))
>>> result.sparsity
0.5

Low and medium effort prune block by block. High effort does so with more samples, rotates the model
before (`besa.rotation`), and trains it as a whole afterwards, towards the dense one
(`besa.recovery`). In between, the rotated model is in `OUT.rotated` and the pruned one in
`OUT.pruned`, from where an interrupted run goes on; so is a model without some of its experts in
`OUT.dropped`.

    torchrun --nproc-per-node 2 -m besa prune MODEL --out pruned

Several processes share the samples (`besa.processes.ranks`); a copy is made by the first of them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from besa.errors import BesaError
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.model.workspace import check_free, publish
from besa.processes.ranks import Ranks, joined
from besa.progress import Tell
from besa.pruning.config import PruneConfig
from besa.pruning.dropped import dropped_copy
from besa.pruning.model_copy import ModelCopy
from besa.pruning.pipeline import PruneResult, prune_blocks
from besa.pruning.rotated import rotated_copy
from besa.pruning.sharing import check_shareable
from besa.recovery.config import RecoverConfig, check_accelerate
from besa.report.pages import write_pages

# Of the training with high effort.
_EPOCHS = 2


def prune(model: str | Path, config: PruneConfig, tell: Tell = lambda event: None) -> PruneResult:
    """Prunes a model on disk (or on the hub, when online) and writes it to `config.out`.

    Args:
        model: directory with config.json and safetensors, or a hub id.
        config: the settings.
        tell: is given every step's event for display.

    Raises:
        BesaError: something that the user can mend; what was finished stays in `OUT.partial`
            and the same call goes on from there.
        PeerLostError: of processes that share the run, another one ended.
    """
    with joined() as ranks:
        return _prune(model, config, tell, ranks)


def _prune(model: str | Path, config: PruneConfig, tell: Tell, ranks: Ranks) -> PruneResult:
    check_shareable(config, ranks)
    check_free(Path(config.out), config.overwrite)
    if config.trains:
        check_accelerate()
    dropped = rotated = None
    if config.drop_experts:
        dropped = ranks.from_leader(lambda: dropped_copy(model, config, tell))
    whole = dropped.directory if dropped else model
    if config.rotate != "off":
        rotated = ranks.from_leader(lambda: rotated_copy(whole, config, tell))
    if config.trains:
        result = _pruned_and_recovered(model, config, dropped, rotated, tell, ranks)
    else:
        result = prune_blocks(model, config, tell, dropped=dropped, rotated=rotated, ranks=ranks)
    for copy in (dropped, rotated):
        if copy is not None:
            ranks.from_leader(copy.remove)
    return result


def _pruned_and_recovered(
    model: str | Path,
    config: PruneConfig,
    dropped: ModelCopy | None,
    rotated: ModelCopy | None,
    tell: Tell,
    ranks: Ranks,
) -> PruneResult:
    """Prunes beside the output, and trains what that gives towards the dense model."""
    # The Trainer takes seconds to import, which other runs are to be spared.
    from besa.recovery.recover import NothingBetterError, recover

    out = Path(config.out)
    first = out.with_name(out.name + ".pruned")
    result = prune_blocks(
        model,
        replace(config, out=first),
        tell,
        may_be_there=True,
        dropped=dropped,
        rotated=rotated,
        ranks=ranks,
    )
    recovery = RecoverConfig(
        teacher=model,
        out=out,
        text=config.calibration,
        samples=config.sample_count,
        seqlen=int(result.record.settings["seqlen"]),
        column=config.column,
        separator=config.separator,
        bos=config.bos,
        epochs=_EPOCHS,
        batch_size=config.step_samples or 1,
        seed=config.seed,
        device=config.device,
        dtype="auto" if config.dtype == "float16" else config.dtype,
        trust_remote_code=config.trust_remote_code,
        overwrite=config.overwrite,
    )
    try:
        recover(first, recovery, tell)
    except NothingBetterError:
        note = "training the pruned model as a whole made nothing better, and was left out"
        pruned = replace(result.record, notes=(*result.record.notes, note))

        def publish_first() -> None:
            write_pages(pruned, first)
            publish(first, out, config.overwrite)

        ranks.from_leader(publish_first)
    except BesaError as error:
        raise BesaError(f"{error} (the pruned model is in {first})") from None
    else:
        ranks.from_leader(lambda: shutil.rmtree(first))
    record = read_record(out)
    assert isinstance(record, PruneRecord)
    return PruneResult(out, record)
