"""Quality beside speed: the perplexity of the contenders' checkpoints on one text.

>>> perplexities({"sparse": Path("path/to/sparse")}, "builtin:test", windows=2, limit=600)
{'sparse': Perplexity(...)}

By `besa eval`, in a process of its own: the servers have ended by then, and what it loads is gone
before anything else is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from besa.bench.results import Perplexity
from besa.errors import BesaError
from besa.processes.child import ChildError, run_to_end
from besa.typed_json import from_json


def title_of(text: str) -> str:
    """What the results call a text: a file by its name, whichever folder it is in."""
    return Path(text).name if Path(text).exists() else text


def perplexities(
    models: Mapping[str, Path], text: str, windows: int, limit: float
) -> dict[str, Perplexity]:
    """Each model's perplexity by its name.

    Raises:
        BesaError: it cannot be measured.
    """
    command = [sys.executable, "-P", "-m", "besa", "eval", *map(str, models.values())]
    try:
        answer = run_to_end([*command, "--text", text, "--limit", str(windows), "--json"], limit)
    except ChildError as error:
        raise BesaError(f"perplexity: {error}") from None
    results = json.loads(answer)["results"]
    return {
        name: from_json(Perplexity, {**one, "text": title_of(text)})
        for name, one in zip(models, results, strict=True)
    }
