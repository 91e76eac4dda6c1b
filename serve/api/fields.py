"""What becomes of each field of a request: honoured, accepted without effect, or refused by name.

>>> from besa.serve.api.requests import CompletionRequest
>>> supports(CompletionRequest)["suffix"].kind
'refused'
>>> CompletionRequest(prompt="Once", suffix=None).max_tokens is None
True
>>> from besa.serve.api.requests import parsed
>>> parsed(CompletionRequest, {"prompt": "Once", "suffix": "end"})
Traceback (most recent call last):
besa.serve.api.errors.ApiError: suffix="end" is not supported by this server: leave it out

The fields of besa.serve.api.requests are made by the functions here. They are the one table that
both engines, the OpenAPI schema (`x-support`) and docs/serve.md go by.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

Kind = Literal["honoured", "accepted", "refused"]


@dataclass(frozen=True)
class Support:
    """What becomes of a field.

    Attributes:
        says: a sentence for the documentation.
        harmless: values besides null that ask for nothing, so that a refused field may have them.
    """

    kind: Kind
    says: str
    harmless: tuple[Any, ...] = ()


def honoured(says: str, default: Any = None, **limits: Any) -> Any:
    """A field that changes the answer as it asks.

    Args:
        says: for the documentation.
        limits: pydantic's, as `ge`.
    """
    extra: dict[str, Any] = {"x-support": "honoured"}
    return Field(default, description=says, json_schema_extra=extra, **limits)


def accepted(says: str, default: Any = None) -> Any:
    """A field that says nothing about the answer: it may be anything of its type."""
    return Field(default, description=says, json_schema_extra={"x-support": "accepted"})


def refused(*harmless: Any, says: str = "") -> Any:
    """A field that is not honoured.

    Args:
        harmless: values that ask for nothing, besides null.
    """
    extra: dict[str, Any] = {"x-support": "refused", "x-harmless": list(harmless)}
    extra["enum"] = [None, *harmless]
    return Field(None, description=says, json_schema_extra=extra)


@cache
def supports(model: type[BaseModel]) -> dict[str, Support]:
    """What becomes of each field of a request, by its name."""
    return {name: _support(info) for name, info in model.model_fields.items()}


def _support(info: FieldInfo) -> Support:
    extra = info.json_schema_extra
    assert isinstance(extra, dict), "a field is made by `honoured`, `accepted` or `refused`"
    kind, harmless = cast(Kind, extra["x-support"]), cast(list[Any], extra.get("x-harmless", []))
    return Support(kind, info.description or "", tuple(harmless))


def check_harmless(support: Support, name: str, value: Any) -> Any:
    """The value of a field, if the field is not refused or the value asks for nothing.

    Raises:
        PydanticCustomError: of type `unsupported`.
    """
    if support.kind != "refused" or value is None or _is_one_of(value, support.harmless):
        return value
    raise unsupported(f"{name}={shortened(value)}", "leave it out")


def unsupported(what: str, advice: str) -> PydanticCustomError:
    """An error of type `unsupported`."""
    return PydanticCustomError(
        "unsupported",
        "{what} is not supported by this server: {advice}",
        {"what": what, "advice": advice},
    )


def shortened(value: Any, most: int = 60) -> str:
    """A value in JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= most else text[:most] + "…"


def _is_one_of(value: Any, harmless: Sequence[Any]) -> bool:
    """As JSON tells values apart: 1 and 1.0 are one, and 1 and true are two."""
    return any(value == one and (type(value) is bool) == (type(one) is bool) for one in harmless)


def table(models: Mapping[str, type[BaseModel]]) -> str:
    """What becomes of every field, as docs/serve.md says it.

    Args:
        models: the requests, by what their answers are called.
    """
    found = {name: supports(model) for name, model in models.items()}
    lines = ["| field | of | support | |", "| --- | --- | --- | --- |"]
    refused = []
    for name in dict.fromkeys(field for fields in found.values() for field in fields):
        by_support: dict[Support, list[str]] = {}
        for kind, fields in found.items():
            if name in fields:
                by_support.setdefault(_hashable(fields[name]), []).append(kind)
        for support, kinds in by_support.items():
            of = "" if len(kinds) == len(found) else f" ({', '.join(kinds)})"
            if support.kind != "refused":
                where = of.strip(" ()") or "both"
                lines.append(f"| `{name}` | {where} | {support.kind} | {support.says} |")
            else:
                values = " or ".join(f"`{value}`" for value in support.harmless)
                refused.append(f"`{name}`{of}{' unless ' + values if values else ''}")
    listed = textwrap.fill(f"Refused: {', '.join(refused)}.", 100, break_on_hyphens=False)
    return "\n".join([*lines, "", listed])


def _hashable(support: Support) -> Support:
    """The same with its values in JSON."""
    return replace(support, harmless=tuple(map(json.dumps, support.harmless)))
