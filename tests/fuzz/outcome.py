"""What comes of a damaged model: a refusal in a line, the same as before, or what a digest tells.

Each is loaded in a child, so that a crash is one, too: `besa` itself would end by it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from besa.errors import BesaError, printable
from besa.export.packed.unpack import PackedCheckpoint
from besa.model.checkpoint import Checkpoint
from besa.model.digests import check_digests
from besa.model.files import is_onnx, model_directory
from besa.model.loading import load_model
from besa.serve.launch import packing_of
from tests.fuzz.damage import Damage, damage
from tests.fuzz.models import COLUMNS

# Of the processor's time, so that no busy machine makes a hang of what is none.
SECONDS = 120
# More than this a tiny model never takes, whatever its headers promise.
MEGABYTES = 1500


@dataclass(frozen=True)
class Outcome:
    """What came of one seed.

    Attributes:
        result: "refused", "same", "numbers" (other ones, which the digests tell), or what must not
            be: "silent", "raised", "died".
        words: the line of a refusal, or what happened.
    """

    seed: int
    model: str
    damage: Damage
    result: str
    words: str

    @property
    def is_good(self) -> bool:
        """Whether it may be."""
        return self.result in ("refused", "same", "numbers")

    def __str__(self) -> str:
        where = f"{self.model}/{self.damage.file}"
        return f"seed {self.seed}: {where}, {self.damage.kind}: {self.result}: {self.words}"


def outcome(models: dict[str, Path], seed: int, scratch: Path) -> Outcome:
    """Damages a copy of a model as the seed says, and loads it."""
    chance = Random(seed)
    name = chance.choice(sorted(models))
    directory = scratch / "m"
    shutil.copytree(models[name], directory)
    try:
        done = damage(directory, chance)
        result, words = in_child(lambda: _result(models[name], directory, done))
        return Outcome(seed, name, done, result, words)
    finally:
        shutil.rmtree(directory)


def _result(whole: Path, damaged: Path, done: Damage) -> tuple[str, str]:
    try:
        found = read(damaged)
    except BesaError as error:
        return "refused", printable(str(error))
    if _equal(found, read(whole)):
        return "same", ""
    if not done.numbers:
        return "silent", "another result"
    if (damaged / "besa.json").is_file():
        with suppress(BesaError):
            check_digests(damaged)
            return "silent", "another result, and the digests agree"
    return "numbers", ""


def read(directory: Path) -> Any:
    """All numbers of a model, by each way in which besa reads it, and what it computes."""
    tokens = torch.arange(1, 20)
    if is_onnx(directory):
        from besa.export.onnx.runtime import open_session, ort_library
        from besa.serve.onnx.description import described_by

        name = described_by(directory)["model"]["decoder"]["filename"]
        session = open_session(directory / str(name), ort_library(), threads=1)
        x = torch.sin(torch.arange(3 * COLUMNS).float()).view(1, 3, COLUMNS)
        try:
            return [torch.from_numpy(each) for each in session.run(None, {"x": x.numpy()})]
        except Exception as error:  # noqa: BLE001 - of ONNX Runtime's many kinds
            raise BesaError(str(error)) from None
    model_directory(directory)
    numbers: dict[str, Any] = {}
    if packing_of(directory) is not None:
        packed = PackedCheckpoint.open(directory)
        numbers = {name: packed.dense(name) for name in sorted(packed.skeleton.targets)}
    else:
        checkpoint = Checkpoint.open(directory)
        for index in range(len(checkpoint.blocks)):
            block = checkpoint.load_block(index)
            numbers |= {f"{index}.{name}": value for name, value in block.state_dict().items()}
    model = load_model(directory, "auto", "cpu")
    with torch.no_grad():
        numbers["logits"] = model(tokens[None]).logits
    return numbers


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[x], theirs[x]) for x in theirs)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def in_child(work: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """What `work` gives in a process of its own, or how that ended."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        try:
            answer = work()
        except BaseException:  # noqa: BLE001 - whatever it is, it is no line of besa's
            answer = "raised", traceback.format_exc()
        with os.fdopen(theirs, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        text = file.read()
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code or not text:
        return "died", signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if usage.ru_maxrss > (_peak() + MEGABYTES) * 1024:
        return "died", f"took {usage.ru_maxrss // 1024} MB"
    result, words = json.loads(text)
    return result, words


def _peak() -> int:
    """The most megabytes that this process had, which a child begins with."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
