"""results.json: what was measured, on what, and what follows from it.

>>> results = read_results(Path("path/to/results.json"))
>>> results.comparisons["50%"]["1 at a time"]["output_tps"].median > 0
True

All times are in seconds, all sizes in bytes. A gain is a ratio that is above 1 where the contender
is better than the reference, whichever way the figure goes. The file's keys are the names of the
fields here; `SCHEMA_VERSION` grows when one of them changes its meaning.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from besa.bench.statistics import Gain, Spread
from besa.errors import BesaError
from besa.report.formatting import in_windows
from besa.typed_json import ABSENT_IF_DEFAULT, ShapeError, from_json, to_json

SCHEMA_VERSION = 1
# The shares of the values at which a distribution is recorded.
QUANTILES = [i / 20 for i in range(20)] + [0.99, 1.0]

Gains = dict[str, Gain]  # by figure
# Those keys of a contender that a run without servers does not have.
_OF_SERVERS = ("environment", "idle_cores", "same_answers")


@dataclass(frozen=True)
class Settings:
    """What was asked for, without this machine's folders; see `besa.bench.settings.BenchConfig`."""

    loads: tuple[str, ...]
    auto_rates: bool
    slo: dict[str, float]
    slo_share: float
    input_length: int
    output_length: int
    prompts: str
    requests: int
    rounds: int
    warmup: int
    seed: int
    engine: str | None
    engine_args: tuple[str, ...]
    timeout: float
    text: str | None


@dataclass(frozen=True)
class LoadGenerator:
    name: str
    version: str


@dataclass(frozen=True)
class Machine:
    """The machine, as far as figures depend on it.

    Attributes:
        core_share: the cores' time that a container's quota grants; None without one.
        threads: what OMP_NUM_THREADS says, if it is set.
    """

    cpu: str
    cores: int
    core_share: float | None
    cpu_features: tuple[str, ...]
    memory: int | None
    gpus: tuple[str, ...]
    system: str
    threads: str | None


@dataclass(frozen=True)
class Memory:
    """Bytes of a contender's processes; None where they cannot be seen.

    Attributes:
        steady: what they hold at rest.
        peak: the most that they held.
        gpu: what they hold of the GPUs' memory.
    """

    steady: int | None = None
    peak: int | None = None
    gpu: int | None = None


@dataclass(frozen=True)
class Packing:
    """How a packed model's weights are stored: the values' type, and the pattern of the zeros."""

    values: str
    pattern: str


@dataclass(frozen=True)
class Difference:
    """To the first contender, in nats a token."""

    nats_per_token: float
    standard_error: float


@dataclass(frozen=True)
class Perplexity:
    """A checkpoint's perplexity on `tokens` tokens of a text, in windows of `seqlen`.

    Attributes:
        bos: whether each window began with the tokenizer's beginning token.
    """

    text: str
    perplexity: float | None
    standard_error: float | None
    tokens: int
    seqlen: int
    bos: bool = field(default=False, metadata=ABSENT_IF_DEFAULT)
    difference: Difference | None = None

    @property
    def read(self) -> str:
        """What was read and how, for people."""
        return f"{self.text}, {self.tokens:,} tokens {in_windows(self.seqlen, self.bos)}"


@dataclass(frozen=True)
class ContenderRecord:
    """A contender, what it costs, and whether it is broken.

    Attributes:
        url: where it ran already; None for a server that besa started.
        environment: what its environment had beyond besa's own.
        broken: why it is in no figure; None if nothing is wrong with it.
        start_seconds: from its start to its first answer.
        idle_cores: cores that it used while another contender was measured, at most.
        same_answers: the share of the probes that it answered as the first contender did.
    """

    name: str
    model: str | None
    url: str | None
    engine: str | None
    engine_version: str | None = None
    environment: dict[str, str] | None = None
    flags: tuple[str, ...] | None = None
    packing: Packing | None = None
    random_weights: bool = False
    broken: str | None = None
    start_seconds: float | None = None
    disk_bytes: int | None = None
    memory: Memory = Memory()
    idle_cores: float | None = None
    same_answers: float | None = None
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class LoadRecord:
    """A load: its kind is "concurrency", "rate" or, inside an engine, "batch"."""

    name: str
    kind: str
    value: float


@dataclass(frozen=True)
class Measurement:
    """A contender under a load.

    Attributes:
        rounds: every round's figures by name.
        summary: their spread over the rounds.
        requests: how many there were in all rounds.
        input_tokens, output_tokens: the least and the most of a request.
        quantiles: of "ttft", "itl" and "e2e" over all requests, at the shares of `QUANTILES`.
    """

    contender: str
    load: str
    rounds: tuple[dict[str, float], ...]
    summary: dict[str, Spread]
    requests: int | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    input_tokens: tuple[int, ...] | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    output_tokens: tuple[int, ...] | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    quantiles: dict[str, tuple[float, ...]] | None = field(default=None, metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True)
class HeldRate:
    """The highest rate at which an objective held (0: at none), and the lowest at which it did not.

    Attributes:
        above: None if it held at every rate that was tried.
        gain: over the reference's; None where either has no such rate.
    """

    rate: float
    above: float | None
    gain: Gain | None = field(default=None, metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True)
class Objective:
    """The limits in seconds, the share of requests that has to be within them, and what held."""

    limits: dict[str, float]
    share: float
    rates: dict[str, HeldRate]


def broken_note(name: str, why: str) -> str:
    """The note about a broken contender, for people who read the notes alone."""
    return f"{name} is broken and not in any figure: {why}."


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run of `besa bench`.

    Attributes:
        kind: "serving" over HTTP, or "offline" inside the engines.
        reference: the contender that the others are compared with; None if all are broken. Inside
            several engines each one's first contender is, and this is the first of all.
        comparisons: the gains by contender, load and figure.
        quality: {"skipped": why}, or each contender's perplexity by name.
        notes: what a reader has to know before believing a figure.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str
    date: str
    settings: Settings
    generator: LoadGenerator | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    machine: Machine
    versions: dict[str, str]
    reference: str | None
    contenders: tuple[ContenderRecord, ...]
    loads: tuple[LoadRecord, ...]
    measurements: tuple[Measurement, ...]
    comparisons: dict[str, dict[str, Gains]]
    slo: Objective | None = None
    quality: dict[str, Perplexity | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> list[ContenderRecord]:
        """The contenders that are not broken."""
        return [one for one in self.contenders if one.broken is None]

    @property
    def broken(self) -> list[ContenderRecord]:
        return [one for one in self.contenders if one.broken is not None]

    @property
    def other_notes(self) -> list[str]:
        """The notes without those that name a broken contender."""
        named = {broken_note(one.name, one.broken or "") for one in self.broken}
        return [note for note in self.notes if note not in named]

    def by_load(self) -> Iterator[tuple[Measurement, Gains]]:
        """Every measurement, load by load, with its gains over the reference's."""
        for load in self.loads:
            for one in self.measurements:
                if one.load == load.name:
                    yield one, self.comparisons.get(one.contender, {}).get(load.name, {})


def results_json(results: Results) -> dict[str, Any]:
    """What results.json holds."""
    written: dict[str, Any] = to_json(results)
    if results.kind == "offline":
        for contender in written["contenders"]:
            for key in _OF_SERVERS:
                del contender[key]
    return written


def results_csv(results: Results) -> str:
    """A line for each measurement: contender, load, round, and every figure."""
    rounds = [figures for one in results.measurements for figures in one.rounds]
    names = list(dict.fromkeys(name for figures in rounds for name in figures))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["contender", "load", "round", *names])
    for one in results.measurements:
        for number, figures in enumerate(one.rounds, 1):
            values = [figures.get(name, "") for name in names]
            writer.writerow([one.contender, one.load, number, *values])
    return out.getvalue()


def read_results(path: Path) -> Results:
    """What `besa bench` wrote.

    Raises:
        BesaError: it is no such file, or of a version that this besa does not know.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BesaError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BesaError(f"{path} is no JSON: give a results.json of `besa bench`") from None
    if not isinstance(found, dict) or "schema_version" not in found:
        raise BesaError(f"{path} is no results.json of `besa bench`")
    if found["schema_version"] != SCHEMA_VERSION:
        raise BesaError(
            f"{path} has schema version {found['schema_version']}, this besa reads {SCHEMA_VERSION}"
        )
    try:
        return from_json(Results, found)
    except ShapeError as error:
        raise BesaError(f"{path} is damaged: {error}") from None
