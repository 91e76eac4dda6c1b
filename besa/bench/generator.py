"""The load generator: a program of others, well kept, in a process of its own.

`vllm bench serve` is the default; guidellm (`pip install 'besa[bench]'`) makes the load where vLLM
is not installed, or with `--generator guidellm`.

>>> set(installed()) <= {"vllm", "guidellm"}
True

`generator_for` starts one, and its `measure` makes a `Load` and tells what was answered.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from besa.bench.child import AnsweringChild
from besa.bench.client import Target
from besa.bench.guidellm_client import GuidellmClient
from besa.bench.load import Load
from besa.bench.load_client import Answered, LoadClient, Order
from besa.bench.vllm_client import VllmClient
from besa.errors import BesaError
from besa.processes.child import ChildError
from besa.processes.usage import cpu_seconds, family
from besa.typed_json import from_json, to_json

# By the names of --generator; the default is the first that is installed.
CLIENTS: dict[str, LoadClient] = {"vllm": VllmClient(), "guidellm": GuidellmClient()}

_START_SECONDS = 300


def installed() -> list[str]:
    """The names of the load generators that are here, the default first."""
    return [name for name, client in CLIENTS.items() if client.version() is not None]


def generator_for(name: str | None) -> Generator:
    """The one of that name, or the default.

    Raises:
        BesaError: it is not installed.
    """
    if name not in (None, *CLIENTS):
        raise BesaError(f"--generator {name} is none of {', '.join(CLIENTS)}")
    here = installed()
    if name is not None and name not in here:
        raise BesaError(f"--generator {name} is not installed")
    if not here:
        raise BesaError("nothing here makes load: pip install 'besa[bench]', or install vLLM")
    return Generator(name or here[0])


class Generator:
    """A load generator in a process that stays; started again after it had to be ended.

    Attributes:
        name: what results call it.
        version: its version.
    """

    def __init__(self, which: str) -> None:
        self._which, self._client = which, CLIENTS[which]
        self.name, self.version = self._client.name, self._client.version() or ""
        self._child: AnsweringChild | None = None
        # The generator's temporary files: a process that is killed removes none.
        self._folder = tempfile.TemporaryDirectory(prefix="besa-bench-", ignore_cleanup_errors=True)

    def __enter__(self) -> Generator:
        self._started()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()
        self._folder.cleanup()

    def cpu(self) -> float:
        """Seconds that it has computed."""
        return 0.0 if self._child is None else cpu_seconds(family(self._child.popen.pid))

    def _started(self) -> AnsweringChild:
        if self._child is None:
            command = [sys.executable, "-P", "-m", "besa.bench.client_process", self._which]
            environment = {**self._client.environment, "TMPDIR": self._folder.name}
            self._child = AnsweringChild(command, environment)
            try:
                self._child.answer(_START_SECONDS)
            except ChildError as error:
                self._child = None
                raise BesaError(f"{self.name} does not start: {error}") from None
        return self._child

    def measure(
        self,
        target: Target,
        prompts: Sequence[str],
        load: Load,
        output_length: int,
        seed: int,
        limit: float,
    ) -> Answered:
        """Sends the prompts, greedily decoded, and waits for all answers.

        Args:
            limit: seconds for all of it.

        Raises:
            ChildError: not all answers came in time, or the generator failed.
        """
        order = Order(
            url=target.url,
            model=target.model,
            key=target.key,
            prompts=tuple(prompts),
            output_length=output_length,
            ignore_eos=target.ignores_eos,
            concurrency=int(load.value) if load.kind == "concurrency" else None,
            rate=load.value if load.kind == "rate" else None,
            seed=seed,
        )
        child = self._started()
        try:
            found = child.ask(to_json(order), limit)
        except ChildError:
            child.kill()
            self._child = None
            raise
        return from_json(Answered, found)
