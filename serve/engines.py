"""The engines that serve: what besa has to know of each, and the one table of them.

>>> list(ENGINES)
['vllm', 'transformers', 'onnx']
>>> engine = engine_named("onnx")
>>> engine.reads_onnx
True

To add one: a file with a subclass of `Engine`, and a line in `ENGINES`. Its module is imported by
`besa serve` and by every process of an engine, so it imports heavy packages inside its methods.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, ClassVar

from besa.errors import BesaError

if TYPE_CHECKING:  # it asks for the names of the engines
    from besa.serve.settings import ServeConfig

# By the names that --engine takes. Of those that fit a model, the first that is installed serves.
ENGINES = {
    "vllm": "besa.serve.vllm.engine:VllmEngine",
    "transformers": "besa.serve.transformers.engine:TransformersEngine",
    "onnx": "besa.serve.onnx.engine:OnnxEngine",
}


@dataclass(frozen=True)
class Launch:
    """What an engine is started with, beyond what all engines are.

    Attributes:
        flags: of its command line.
        environment: variables; the user's own are left as they are.
    """

    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """What a batch took, step by step.

    Attributes:
        prefill: seconds for the prompts of the whole batch, and the first new tokens.
        steps: seconds for each further token of every sequence.
        tokens: the new tokens of the last sequence.
    """

    prefill: float
    steps: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class OfflineModel:
    """A model in an engine without a server.

    Attributes:
        vocabulary: how many tokens it knows.
        generate: continues prompts of one length, greedily, by so many tokens after the first.
    """

    vocabulary: int
    generate: Callable[[list[list[int]], int], Generated]


class Engine(ABC):
    """An engine, as `besa serve` and `besa bench` see it.

    Attributes:
        name: what --engine calls it.
        key_variable: where it reads its API key from: a command line is for all to see.
        reads_onnx: whether its models are ONNX graphs; else they are checkpoints.
    """

    name: ClassVar[str]
    key_variable: ClassVar[str] = "BESA_API_KEY"
    reads_onnx: ClassVar[bool] = False

    @abstractmethod
    def version(self) -> str | None:
        """The version that is installed; None without one."""

    @abstractmethod
    def check(self) -> None:
        """Raises a BesaError if it cannot serve here, which says what to install."""

    @abstractmethod
    def launch(self, config: ServeConfig, directory: Path) -> Launch:
        """Flags and environment for its server.

        Raises:
            BesaError: a flag of the user's that `besa serve` cannot go along with.
        """

    def version_warning(self, version: str) -> str | None:  # noqa: ARG002
        """What a user should know of a version that may not load packed models; None else."""
        return None

    @abstractmethod
    def run(self, arguments: list[str]) -> None:
        """Serves until a signal comes; in a process of its own.

        Args:
            arguments: the model's directory, and flags.
        """

    def offline_environment(self) -> Mapping[str, str]:
        """What its environment has for `load_offline`; the user's own variables win."""
        return {}

    @abstractmethod
    def load_offline(self, directory: str, most: int, longest: int) -> OfflineModel:
        """Loads a model into this process, for `besa bench --offline`.

        Args:
            most, longest: sequences at a time, and tokens of each.
        """


def engine_named(name: str) -> Engine:
    """The engine that --engine calls so.

    Raises:
        KeyError: there is none.
    """
    found: Engine = resolve_name(ENGINES[name])()
    return found


def engines() -> list[Engine]:
    """All engines, in the order in which they are preferred."""
    return [engine_named(name) for name in ENGINES]


def need(who: str, packages: tuple[str, ...], extra: str) -> None:
    """Raises a BesaError that names the packages which are not installed, and besa's extra."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BesaError(
            f"{who} cannot serve without {', '.join(missing)}: pip install 'besa[{extra}]'"
        )
