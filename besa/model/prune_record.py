"""What `besa prune` leaves in besa.json: what every block and linear got and lost.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> record = read_record(Path("path/to/pruned"))
>>> record.sparsity.achieved, record.blocks[0].linears[0].name
(0.5, 'self_attn.q_proj')

A field is a key of the file. `Record` is what exports leave, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from besa.typed_json import ABSENT_IF_DEFAULT


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every run leaves.

    Attributes:
        besa_version: of the besa that ran.
        model: the directory or hub id that it was given.
        architecture: the name of the model's class.
        loader: the name of transformers' class that loads it.
        settings: all that the result depends on, as the run was given it.
        versions: of besa, Python and the libraries.
        seconds: from start to end; of a run that was resumed, of its last part.
        peak_memory_bytes: the most memory that the process had.
        digests: the SHA-256 of each file of weights.
        companion_digests: of each file that describes them: config, index, tokenizer, code.
    """

    besa_version: str = ""
    model: str
    architecture: str = ""
    loader: str = field(default="AutoModelForCausalLM", metadata=ABSENT_IF_DEFAULT)
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    digests: dict[str, str] = field(default_factory=dict)
    companion_digests: dict[str, str] = field(default_factory=dict, metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Zeros over all pruned linears; `target` and `achieved` are fractions of `weights`."""

    target: float | None = None
    achieved: float
    zeros: int = 0
    weights: int = 0


@dataclass(frozen=True, kw_only=True)
class RowRates:
    """How the rows of a linear share its zeros.

    Attributes:
        min, mean, max: of the rows' fractions of zeros.
        histogram: rows in each of equal bins over [0, 1].
    """

    min: float
    mean: float
    max: float
    histogram: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """The zeros of one linear.

    Attributes:
        name: within the block.
        shape: [out, in], or [experts, out, in].
        zeros: how many weights are zero; `sparsity` is their fraction.
        rows: how the rows share them.
        unrouted_experts: experts that no calibration token reached.
        expert_tokens: calibration tokens that each expert read; empty of other linears.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int = 0
    sparsity: float
    rows: RowRates | None = None
    unrouted_experts: tuple[int, ...] = field(default=(), metadata=ABSENT_IF_DEFAULT)
    expert_tokens: tuple[int, ...] = field(default=(), metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True, kw_only=True)
class TriedUpdate:
    """What was tried after a block's mask.

    Attributes:
        update: none, admm or learn.
        step: of Adam, as a share of a matrix's root mean square, where weights were learned.
        mask: whose mask it follows, where that is not the method's own.
        error: of the block's output on held-out windows, half by size and half by token.
    """

    update: str
    step: float | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    mask: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class BlockUpdate:
    """What follows a block's mask.

    Attributes:
        chosen, step, mask: of what was tried, what the block ended with.
        tried: the cheapest first, for each mask.
    """

    chosen: str
    step: float | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    mask: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    tried: tuple[TriedUpdate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What rounding did to a block's weights.

    Attributes:
        groups: how many scales there are.
        zero_groups: those with nothing to scale.
        clipped: groups whose largest weight is smaller than in the dense model by 2% or more.
        added_zeros: weights that the mask kept and that became zero.
    """

    groups: int
    zero_groups: int
    clipped: int
    added_zeros: int


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One pruned block.

    Attributes:
        index, name: its place among the blocks, and its name in the model.
        weights, zeros, sparsity: of its pruned linears together.
        error: ‖target − pruned‖² / ‖target‖² of its output; the target is what the dense block
            gives, on the same input or in the dense model (the setting `teacher`).
        error_wanda: the same with Wanda's mask at the same rate; None if that is the method's own.
        loss: the mean loss of each epoch, of a method that learns masks.
        seconds: what the block took.
        update: what was chosen by held-out windows; None where nothing was.
        rounding: of its weights, if they were rounded; `zeros` holds what that added.
    """

    index: int
    name: str = ""
    weights: int = 0
    zeros: int = 0
    sparsity: float
    linears: tuple[LinearRecord, ...]
    error: float | None = None
    error_wanda: float | None = None
    loss: tuple[float | None, ...] = ()
    seconds: float = 0.0
    update: BlockUpdate | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    rounding: Rounding | None = field(default=None, metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Training as a whole, after pruning (`besa recover`).

    Attributes:
        teacher: the dense model that it was trained towards.
        settings: all that the result depends on.
        step: the size of Adam's first step, as a share of a matrix's root mean square.
        tokens: of the text, as often as they were read.
        before, after: the mean divergence of the next-token distributions from the teacher's on
            held-out samples, in nats a token.
        seconds: from start to end; of a run that was resumed, of its last part.
    """

    teacher: str
    settings: dict[str, Any]
    step: float
    tokens: int
    before: float
    after: float
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PruneRecord(Record):
    """What `besa prune` leaves, and `besa recover` after it.

    Attributes:
        format: the version of this record.
        device, dtype, threads: where and how it was computed.
        processes: how many shared the samples, in the last part of a run that was resumed.
        sparsity: what was asked for and achieved.
        blocks: in the model's order.
        peak_device_memory_bytes: the most memory that was in use on a GPU; None on a CPU.
        notes: what the user should know of the run, a sentence each.
        dropped_experts: what was left out before pruning, by the names of the experts' modules, as
            the model numbered them.
        rotation: what was rotated before pruning, in words.
        recovery: how the pruned model was trained; the blocks' figures are from before.
    """

    format: int = 1
    device: str = ""
    dtype: str = ""
    threads: int | None = None
    processes: int = field(default=1, metadata=ABSENT_IF_DEFAULT)
    sparsity: Sparsity
    blocks: tuple[BlockRecord, ...] = ()
    peak_device_memory_bytes: int | None = None
    notes: tuple[str, ...] = ()
    dropped_experts: dict[str, tuple[int, ...]] = field(
        default_factory=dict, metadata=ABSENT_IF_DEFAULT
    )
    rotation: str | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    recovery: Recovery | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
