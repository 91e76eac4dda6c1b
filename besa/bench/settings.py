"""What `besa bench` was asked for: `BenchConfig`, checked once.

>>> parse_contender("dense=models/Llama").name, parse_contender("models/Llama").name
('dense', 'Llama')
>>> parse_slo("ttft=500ms,itl=0.05s")
{'ttft': 0.5, 'itl': 0.05}
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from besa.bench.load import Load
from besa.errors import BesaError
from besa.settings import described, setting

SLO_NAMES = ("ttft", "itl", "e2e")


@dataclass(frozen=True)
class Contender:
    """What is measured: a model that besa serves, or a server that runs already.

    Attributes:
        name: what the tables call it.
        model: directory or hub id; for a server, what it calls its model (None: its first one).
        url: where the server is, without a path; None for a model that besa serves.
        random_weights: whether its weights are random, so that what it says means nothing.
    """

    name: str
    model: str | None
    url: str | None = None
    random_weights: bool = False


def parse_slo(text: str) -> dict[str, float]:
    """Limits in seconds: `ttft=500ms,itl=50ms`.

    Raises:
        BesaError: it is not that.
    """
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=(\d+(?:\.\d*)?|\.\d+)(ms|s)", part.strip())
        if not match or match[1] not in SLO_NAMES or float(match[2]) == 0:
            names = ", ".join(SLO_NAMES)
            raise BesaError(f"--slo {text!r} is not like ttft=500ms,itl=50ms (of {names})")
        found[match[1]] = float(match[2]) / (1000 if match[3] == "ms" else 1)
    return found


def _flags(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise BesaError(f"--engine-args {text!r}: {error}") from None


@dataclass(frozen=True)
class BenchConfig:
    """A comparison of contenders under loads.

    Attributes:
        contenders: the first is what the others are compared with.
        loads: in this order; none with `auto_rates` only.
        auto_rates: also shares of the rate at which the fastest contender saturates.

    Raises:
        BesaError: a value that cannot be.
    """

    contenders: tuple[Contender, ...]
    out: Path = setting(Path("besa-bench"), "(default: besa-bench-DATE-TIME)", metavar="DIR")
    loads: tuple[Load, ...] = (Load("concurrency", 1), Load("concurrency", 4))
    auto_rates: bool = False
    slo: Mapping[str, float] = field(
        default_factory=dict,
        metadata=described(
            "search for the highest rate within ttft=500ms,itl=50ms",
            metavar="LIMITS",
            parse=parse_slo,
        ),
    )
    slo_share: float = setting(
        0.9,
        "share of requests that have to be within the limits (default: %(default)s)",
        metavar="S",
    )
    input_length: int = setting(
        128, "tokens (default: %(default)s)", name="--input-len", metavar="N"
    )
    output_length: int = setting(
        64, "tokens (default: %(default)s)", name="--output-len", metavar="N"
    )
    prompts: Path | None = setting(
        None,
        "prompts instead of synthetic ones: one a line, or .jsonl with a prompt or text",
        metavar="FILE",
    )
    requests: int = setting(
        8,
        "in each measurement, and at least 4 for each at a time (default: %(default)s)",
        metavar="N",
    )
    rounds: int = setting(5, "(default: %(default)s)", metavar="N")
    warmup: int = setting(
        1,
        "requests before each measurement that do not count (default: %(default)s)",
        metavar="N",
    )
    seed: int = setting(0, "of prompts and arrivals (default: %(default)s)")
    engine: str | None = setting(None, "vllm or transformers (default: vllm where it is installed)")
    engine_args: tuple[str, ...] = setting(
        (),
        "flags for the engine, of every contender alike: --engine-args='--max-model-len 2048'",
        metavar="'FLAGS'",
        parse=_flags,
    )
    generator: str | None = setting(
        None, "vllm or guidellm (default: vllm's where it is installed)"
    )
    tokenizer: str | None = setting(
        None, "to count --input-len with, where there are only URLs", metavar="DIR"
    )
    timeout: float = setting(
        600,
        "for one measurement; a contender that takes longer hangs (default: %(default)g)",
        metavar="SECONDS",
    )
    start_timeout: float = setting(
        900, "for a server to start (default: %(default)g)", metavar="SECONDS"
    )
    quality: bool = setting(True, "do not measure perplexity", name="--skip-quality")
    text: str = setting("builtin:test", "what perplexity is measured on, as in `besa eval`")
    windows: int = setting(
        32, "windows of it, as `besa eval --limit` (default: %(default)s)", metavar="N"
    )

    def __post_init__(self) -> None:
        names = [contender.name for contender in self.contenders]
        for name in names:
            if names.count(name) > 1:
                raise BesaError(f"two contenders are called {name}: name them, as NAME={name}")
        if not names:
            raise BesaError("nothing to measure: give a model, or --url NAME=URL")
        least = {
            "input_length": 1,
            "output_length": 2,
            "requests": 1,
            "rounds": 1,
            "warmup": 0,
            "windows": 1,
            "timeout": 0.1,
            "start_timeout": 0.1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                flag = name.replace("_", "-")
                raise BesaError(f"--{flag} is {getattr(self, name)}: at least {smallest}")
        if not 0 < self.slo_share <= 1:
            raise BesaError(f"--slo-share is {self.slo_share}: above 0, at most 1")


def parse_contender(text: str) -> Contender:
    """A model as the command line takes it: a directory or hub id, with or without a NAME=."""
    name, equals, model = text.partition("=")
    if not equals or "/" in name:
        name, model = Path(text).resolve().name or text, text
    if not name or not model:
        raise BesaError(f"{text!r} is not MODEL or NAME=MODEL")
    return Contender(name, model)


def parse_url(text: str) -> Contender:
    """A server as --url takes it: NAME=URL, and with #MODEL what it calls the model.

    Raises:
        BesaError: it is not that.
    """
    name, equals, url = text.partition("=")
    url, _, model = url.partition("#")
    if not equals or not name or not re.match(r"https?://[^/\s]+", url):
        raise BesaError(f"--url {text!r} is not NAME=URL, as old=http://127.0.0.1:8000")
    return Contender(name, model or None, url.rstrip("/").removesuffix("/v1"))


def parse_loads(text: str | None, kind: str) -> tuple[Load, ...]:
    """Loads of a list of numbers: `1,4,16`.

    Raises:
        BesaError: a number that cannot be.
    """
    found = []
    for part in (text or "").split(","):
        if not part.strip():
            continue
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6 or (kind == "concurrency" and value != int(value)):
            raise BesaError(f"--{kind} {text}: {part.strip()!r} is no such number")
        found.append(Load(kind, value))
    return tuple(found)
