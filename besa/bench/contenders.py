"""Contenders at work: a server that besa starts or that runs already, watched for faults.

    with Server(Contender("sparse", "SPARSE"), config) as server:
        server.start()
        server.target                # where the load goes
        server.check(turn=1)         # BrokenError if it is not what it was

A contender that dies, hangs, answers errors, or answers a prompt otherwise than it did before is
broken: it says so here, once, and is not asked again.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from besa.bench.generator import Target
from besa.bench.results import Memory, Packing
from besa.bench.settings import BenchConfig, Contender
from besa.model.files import is_onnx, model_directory
from besa.model.record import OnnxRecord, read_record
from besa.processes.usage import cpu_seconds, family, listener, memory_of
from besa.serve.command import EngineCommand, command_for
from besa.serve.launch import free_port, packing_of
from besa.serve.process import EngineError, RunningEngine
from besa.serve.settings import ServeConfig

# Shorter than a block of any engine's cache, so that a second answer is computed like the first.
PROBES = ("The", "One day the", "It is said that", "In the middle of the night")
_PROBE_TOKENS = 12
_CACHE = "VLLM_CPU_KVCACHE_SPACE"


class BrokenError(Exception):
    """What is wrong with a contender, in a line."""


class Server:
    """A contender's server; leaving the `with` block ends whatever besa started of it.

    Attributes:
        broken: what is wrong with it, or None.
        idle_cpu: cores that it used while another one was measured, at most.
        start_seconds: from its start to its first answer; None for one that ran already.
        answers: to each of `PROBES`, in the first round.
    """

    def __init__(self, contender: Contender, config: BenchConfig) -> None:
        self.contender, self.config = contender, config
        self.broken: str | None = None
        self.start_seconds: float | None = None
        self.engine: RunningEngine | None = None
        self.command: EngineCommand | None = None
        self.target: Target | None = None
        self.answers: list[str] = []
        self._second: list[str] = []
        self.pid: int | None = None
        self.idle_cpu = 0.0
        self.memory = Memory()
        self.directory: Path | None = None
        self.packing: Packing | None = None
        if contender.url is None:
            assert contender.model is not None
            self.directory = model_directory(contender.model)
            self.packing = packing(self.directory)

    @property
    def name(self) -> str:
        return self.contender.name

    @property
    def is_graph(self) -> bool:
        """Whether it is for ONNX Runtime, whatever the others' engine is."""
        return self.directory is not None and is_onnx(self.directory)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends what besa started of it."""
        if self.engine is not None:
            self.engine.shown = False
            self.engine.kill()

    def start(self, shared: dict[str, str]) -> None:
        """Starts the server, or looks for the one that runs, and takes its first answers.

        Args:
            shared: what the first one's environment has and all others' get, too.

        Raises:
            BrokenError: it cannot be started, or does not answer.
        """
        if self.contender.url is not None:
            self._find()
        else:
            self._start(shared)
        assert self.target is not None
        self.target = replace(self.target, ignores_eos=self._ignores_eos())
        self.answers = [self._ask(prompt) for prompt in PROBES]
        # A cache may change the last bits, and with them a close decision, but only once.
        self._second = [self._ask(prompt) for prompt in PROBES]

    def _find(self) -> None:
        assert self.contender.url is not None
        key = os.environ.get("OPENAI_API_KEY") or None
        self.target = Target(self.contender.url, self.contender.model or "", key)
        listed = self._request("/v1/models")
        try:
            names = [one["id"] for one in listed["data"]]
            wanted = self.contender.model or names[0]
        except (KeyError, IndexError, TypeError):
            raise BrokenError("its /v1/models lists no model") from None
        if wanted not in names:
            raise BrokenError(f"it serves no {wanted}, but {', '.join(names)}")
        self.target = Target(self.contender.url, wanted, key)
        self.pid = listener(self.contender.url)

    def _start(self, shared: dict[str, str]) -> None:
        assert self.directory is not None
        served = ServeConfig(
            model=str(self.directory),
            engine=None if self.is_graph else self.config.engine,
            port=free_port("127.0.0.1", 0),
            served_model_name=self.name,
            shutdown_timeout=0,
            engine_args=() if self.is_graph else self.config.engine_args,
        )
        command = command_for(served, self.directory)
        environment = dict(command.environment)
        if (found := environment.get(_CACHE)) and _CACHE not in os.environ:
            # From the memory that was free for the first one, which is not alone.
            count = sum(one.url is None for one in self.config.contenders)
            environment[_CACHE] = shared.setdefault(_CACHE, str(max(1, int(found) // count)))
        self.command = replace(command, environment=environment)
        started = time.perf_counter()
        self.engine = RunningEngine(self.command, served)
        self.pid = self.engine.popen.pid
        late = threading.Timer(self.config.start_timeout, self.engine.kill)
        late.daemon = True
        late.start()
        try:
            self.engine.wait_until_ready()
        except EngineError as error:
            if not late.is_alive():
                seconds = f"{self.config.start_timeout:g} s"
                raise BrokenError(f"did not start within {seconds}") from None
            raise BrokenError(str(error)) from None
        finally:
            late.cancel()
            self.engine.shown = False
        self.start_seconds = time.perf_counter() - started
        self.target = Target(served.url, served.name)

    def check(self, turn: int) -> None:
        """Asks one of the first questions again, another one every turn.

        Raises:
            BrokenError: it is dead, does not answer, or answers otherwise.
        """
        which = turn % len(PROBES)
        answer, first = self._ask(PROBES[which]), self.answers[which]
        if answer not in (first, self._second[which]):
            raise BrokenError(
                f"answers the same prompt otherwise than before: {PROBES[which]!r} by "
                f"{_short(answer)}, not {_short(first)}"
            )

    def why(self, what: str) -> str:
        """`what`, or that the server has ended, which explains it."""
        if self.engine is None:
            return what
        with suppress(Exception):  # a moment for an end to be seen
            self.engine.popen.wait(timeout=1)
        if self.engine.popen.poll() is None:
            return what
        reason = self.engine.reason()
        return f"its server ended{': ' + reason if reason else ''}"

    def _ignores_eos(self) -> bool:
        """Whether it takes a field that is vLLM's own."""
        assert self.target is not None
        body = {"model": self.target.model, "prompt": "The", "max_tokens": 2, "ignore_eos": True}
        try:
            self._request("/v1/completions", body)
        except BrokenError as error:
            if "status 4" not in str(error):
                raise
            return False
        return True

    def _ask(self, prompt: str) -> str:
        """The greedy answer to a prompt."""
        assert self.target is not None
        body = {
            "model": self.target.model,
            "prompt": prompt,
            "max_tokens": _PROBE_TOKENS,
            "temperature": 0,
        }
        found = self._request("/v1/completions", body)
        try:
            return str(found["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise BrokenError("its answer to a completion has no text") from None

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self.target is not None
        headers = {"Content-Type": "application/json"}
        if self.target.key:
            headers["Authorization"] = f"Bearer {self.target.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.target.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise BrokenError(f"answers {path} with status {error.code}") from None
        except TimeoutError:
            raise BrokenError(self.why(f"no answer within {self.config.timeout:g} s")) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                what = f"no answer within {self.config.timeout:g} s"
            else:
                what = f"cannot be reached: {getattr(error, 'reason', None) or error}"
            raise BrokenError(self.why(what)) from None
        except ValueError:
            raise BrokenError(f"answers {path} with what is no JSON") from None

    # ---- what it costs the machine

    def cpu(self) -> float:
        """Seconds that its processes have computed; 0 where they cannot be seen."""
        return cpu_seconds(family(self.pid)) if self.pid is not None else 0.0

    def weigh(self) -> None:
        """Notes its memory: the last steady value, the highest peak."""
        if self.pid is None:
            return
        now = Memory(**memory_of(family(self.pid)))
        peak = max((x for x in (now.peak, self.memory.peak) if x is not None), default=None)
        gpu = max((x for x in (now.gpu, self.memory.gpu) if x is not None), default=None)
        self.memory = Memory(now.steady, peak, gpu)

    def disk_bytes(self) -> int | None:
        """Bytes of the checkpoint's weights."""
        return None if self.directory is None else weight_bytes(self.directory)


def weight_bytes(directory: Path) -> int | None:
    """Bytes of a checkpoint's weights; None where there are none."""
    for kinds in (("*.safetensors",), ("*.onnx", "*.onnx.data", "*.onnx_data")):
        if found := sum(p.stat().st_size for kind in kinds for p in directory.glob(kind)):
            return found
    return None


def packing(directory: Path) -> Packing | None:
    """The values' type and the pattern of a packed model, for whichever engine; None if it is not.

    Raises:
        BesaError: it is packed in a version of the format that this besa does not know.
    """
    if not is_onnx(directory):
        config = packing_of(directory)
        return None if config is None else Packing(config.values, config.pattern)
    record = read_record(directory)
    if not isinstance(record, OnnxRecord) or not record.sparse:
        return None
    return Packing(record.precision, str(record.pattern))


def _short(words: str) -> str:
    flat = " ".join(words.split())
    return repr(flat if len(flat) <= 40 else flat[:39] + "…")
