"""The settings of `besa eval`.

>>> EvalConfig(texts=("builtin:validation",), seqlen=512).limit is None
True
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from besa.data.beginning import CHOICES
from besa.data.settings import column_setting, separator_setting
from besa.data.texts import has_columns
from besa.errors import BesaError
from besa.settings import DTYPES, check_choices, setting, trust_remote_code_setting


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate on, checked when it is made.

    Raises:
        BesaError: a setting that cannot be.
    """

    texts: tuple[str, ...] = setting(
        ("builtin:test",),
        ".txt, .jsonl, .csv or .parquet file; builtin[:SPLIT]; wikitext2, ptb, c4, fineweb, "
        "redpajama or the id of a data set on the hub; may be given several times (default: "
        "builtin:test)",
        name="--text",
        metavar="SOURCE",
    )
    column: str | None = column_setting("the texts' rows")
    separator: str = separator_setting("a text")
    seqlen: int | None = setting(
        None, "tokens in a window (default: 2048, or what all the models take)", metavar="N"
    )
    bos: str = setting(
        "auto",
        "the beginning token before each window: %(choices)s; auto: if the tokenizer puts one "
        "before a text and the first model minds its absence (default: %(default)s)",
        choices=CHOICES,
    )
    batch_size: int = setting(1, "windows at a time (default: %(default)s)", metavar="N")
    dtype: str = setting(
        "auto", "float32, bfloat16, float16, or auto for the checkpoint's own (default)"
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    trust_remote_code: bool = trust_remote_code_setting()
    limit: int | None = setting(None, "only the first N windows of each text", metavar="N")
    tasks: tuple[str, ...] = setting(
        (),
        "tasks of lm-evaluation-harness to run too (pip install 'besa[eval]')",
        metavar="A,B",
        parse=_names,
    )
    num_fewshot: int | None = setting(
        None, "examples before each question (default: the task's own)", metavar="N"
    )
    task_path: Path | None = setting(
        None, "directory with task definitions of your own", metavar="DIR"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.texts:
            raise BesaError("no text to evaluate on: name at least one")
        for name, least in (("seqlen", 2), ("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BesaError(f"--{name.replace('_', '-')} is {value}: at least {least}")
        if self.column is not None and not any(map(has_columns, self.texts)):
            raise BesaError(f"--column {self.column}: none of the texts has columns")
        if self.dtype not in DTYPES:
            raise BesaError(f"no dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if not self.tasks and (self.num_fewshot is not None or self.task_path is not None):
            raise BesaError("--num-fewshot and --task-path say how to run --tasks: name some")
