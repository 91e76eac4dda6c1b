"""JSON that lies beside a model, which anybody may have written: read, or refused in one line.

>>> read_object(Path("path/to/model/config.json"))["model_type"]
'llama'
>>> Path("deep.json").write_text('{"a":' * 100_000)
500000
>>> read_object(Path("deep.json"))
Traceback (most recent call last):
besa.errors.BesaError: deep.json is damaged (it is nested too deeply): download the model again
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from besa.errors import BesaError, reason_of

# The index of a trillion weights has some 20 MB; a parser makes several times a file's size of it.
LARGEST = 64 << 20


def read_object(path: Path, remedy: str = "download the model again") -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        remedy: what to do if there is none, for the message.

    Raises:
        BesaError: the file cannot be read, is too large, or holds no JSON object.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise BesaError(
                f"{path} has {size / 1e6:,.0f} MB, which is no description of a model: {remedy}"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BesaError(f"{path} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise BesaError(f"{path} is damaged (it is nested too deeply): {remedy}") from None
    except ValueError as error:
        raise BesaError(f"{path} is damaged ({reason_of(error)}): {remedy}") from None
    if not isinstance(found, dict):
        raise BesaError(f"{path} is damaged (it is no JSON object): {remedy}")
    return found
