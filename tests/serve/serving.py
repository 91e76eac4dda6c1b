"""What the tests of `besa serve` share: a server as a process, its clients, and what is right.

The model is the one that besa carries, with a random half of its weights masked: trained, so that
its greedy answers do not hang on the last bit, and no other mask gives the same ones.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa.demo import MODEL
from besa.export import ExportConfig, export
from tests.helpers import PATIENCE

ENGINES = [
    pytest.param(
        "vllm",
        marks=pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed"),
    ),
    "transformers",
]

PROMPTS = ["The function returns", "import os\n", "If the file does not", "class Test(", "def "]
NEW_TOKENS = 24

# The simplest there is: each message is a line.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def masked(directory: Path, seed: int) -> Path:
    """The embedded model with zeros at random."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight[torch.rand(module.weight.shape, generator=generator) < 0.5] = 0
    model.save_pretrained(directory)
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, directory)
    path = directory / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(settings))
    return directory


def packed(dense: Path, directory: Path) -> Path:
    return Path(export(dense, ExportConfig(out=directory)).out)


@cache
def dense_model(directory: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@cache
def greedy(directory: Path, prompt: str, tokens: int = NEW_TOKENS) -> str:
    """What a dense model says, by transformers' own `generate`."""
    model, tokenizer = dense_model(directory)
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def logprobs(directory: Path, prompt: str, tokens: int = NEW_TOKENS) -> list[float]:
    """Of the tokens of `greedy`."""
    model, tokenizer = dense_model(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        logits = model(output).logits[0, ids.shape[1] - 1 : -1]
    chosen = output[0, ids.shape[1] :, None]
    values: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return values


@dataclass
class Served:
    """A `besa serve` that runs."""

    process: subprocess.Popen[str]
    stdout: Path
    stderr: Path
    engine: str
    key: str | None = None

    @property
    def output(self) -> str:
        return self.stdout.read_text()

    @property
    def errors(self) -> str:
        return self.stderr.read_text()

    @property
    def url(self) -> str:
        """Without a path."""
        found = re.match(r"(http\S+)/v1 serves \S+\n", self.output)
        assert found, self.errors
        return found[1]

    @property
    def curl(self) -> list[str]:
        """The line that it prints to try it."""
        return shlex.split(self.output.splitlines()[1])

    def client(self, key: str | None = None) -> OpenAI:
        key = key or self.key or "none"
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def async_client(self) -> AsyncOpenAI:
        key = self.key or "none"
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def request(
        self, method: str, path: str, body: object = None, key: str | None = None
    ) -> tuple[int, str]:
        """The status and the text of an answer; `body` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        if key or self.key:
            request.add_header("Authorization", f"Bearer {key or self.key}")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def says(self, prompt: str, tokens: int = NEW_TOKENS, **more: Any) -> str:
        """Greedily."""
        answer = self.client().completions.create(
            model="sparse", prompt=prompt, max_tokens=tokens, temperature=0, **more
        )
        return str(answer.choices[0].text)

    def processes(self) -> list[psutil.Process]:
        """The engine's; besa is none of them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < deadline, f"{self.engine} hangs: {self.errors}"
            time.sleep(0.05)

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(PATIENCE)


def start(engine: str, model: Path, directory: Path, *flags: object, **environment: str) -> Served:
    """Starts `besa serve` on a port of its own."""
    number = len(list(directory.glob("stdout-*")))
    stdout, stderr = directory / f"stdout-{number}", directory / f"stderr-{number}"
    command = [sys.executable, "-m", "besa", "serve", str(model), "--engine", engine]
    if "--enforce-eager" in flags:  # vLLM compiles some small functions even so: half a minute
        environment["TORCHDYNAMO_DISABLE"] = "1"
    process = subprocess.Popen(
        [*command, "--port", "0", *map(str, flags)],
        cwd=directory,
        env={**os.environ, **environment},
        stdout=stdout.open("w"),
        stderr=stderr.open("w"),
        text=True,
        start_new_session=True,
    )
    return Served(process, stdout, stderr, engine)


def ready(served: Served) -> Served:
    served.wait_for(lambda: len(served.output.splitlines()) == 2)
    return served


def rests(served: Served, **sampling: Any) -> None:
    """Asserts that the engine rests soon after its only client has gone, again and again.

    What is measured is time of the processor, until there is hardly any more: eight answers that
    went on would take as much as eight that somebody waits for.
    """
    asked: Any = {"model": "sparse", "prompt": "def ", "max_tokens": 240}
    client, whole = served.client(), {"ignore_eos": True, **sampling}

    def used() -> float:
        times = [process.cpu_times() for process in served.processes()]
        return sum(each.user + each.system for each in times)

    def until_it_rests() -> float:
        before = now = used()

        def is_idle() -> bool:
            nonlocal now
            earlier = now
            time.sleep(0.5)
            now = used()
            return now - earlier < 0.05

        served.wait_for(is_idle)
        return now - before

    # Whatever it was asked, an engine may look for more before it rests.
    client.completions.create(**{**asked, "max_tokens": 1})
    nothing = until_it_rests()
    before = used()
    client.completions.create(**asked, n=8, extra_body=whole)
    eight = used() - before
    until_it_rests()
    for _ in range(8):
        stream = client.completions.create(**asked, stream=True, extra_body=whole)
        next(iter(stream))
        stream.close()
    assert until_it_rests() - nothing < eight / 2


def finishes(served: Served, dense: Path) -> None:
    """Asserts that SIGTERM leaves what has begun its whole answer, and nothing running after it."""
    processes = served.processes()
    stream = served.client().completions.create(
        model="sparse", prompt=PROMPTS[1], max_tokens=200, temperature=0, stream=True
    )
    parts = [next(iter(stream)).choices[0].text]
    served.process.send_signal(signal.SIGTERM)
    parts += [choice.text for chunk in stream for choice in chunk.choices]
    assert "".join(parts) == greedy(dense, PROMPTS[1], 200)
    assert served.end() == 0
    assert gone(processes)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they all end."""
    return not psutil.wait_procs(processes, PATIENCE)[1]


def finish(served: Served) -> None:
    """However the test went."""
    if served.process.poll() is None:
        served.process.terminate()
        try:
            served.process.wait(60)
        except subprocess.TimeoutExpired:
            served.process.kill()
            served.process.wait()
