"""A command's settings: one dataclass, from whose fields the command line takes its flags.

A setting's type, default, choices and help stand in one place, its field. The type says how its
flag is read: a bool is a switch, a tuple is a flag that may be given several times, and anything
else is one value. A flag that is not given leaves the default to the dataclass.

>>> @dataclass(frozen=True)
... class Example:
...     epochs: int = setting(1, "passes")
...     rates: str = setting("row", "%(choices)s (default: %(default)s)", choices=("row", "layer"))
>>> parser = argparse.ArgumentParser(prog="example")
>>> add_flags(parser, Example)
>>> parser.print_help()  # doctest: +ELLIPSIS
usage: example [-h] [--epochs EPOCHS] [--rates RATES]
...
  --epochs EPOCHS  passes
  --rates RATES    row or layer (default: row)
>>> Example(**given(Example, parser.parse_args(["--epochs", "2"])))
Example(epochs=2, rates='row')
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from besa.errors import BesaError

# What a model is computed in; `auto` leaves the choice to the command.
DTYPES = ("auto", "float32", "bfloat16", "float16")

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """What the command line knows of a setting, besides its type and its default.

    Attributes:
        help: what the setting is; `%(default)s` and `%(choices)s` stand for those, `%%` for a %.
        name: of the flag, where it is not that of the field.
        metavar: what the help calls the value.
        choices: the values that the setting may have, for `check_choices` and the help.
        parse: makes the setting from the flag's text, where its type does not say how.
    """

    help: str
    name: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None


def described(
    help: str,  # noqa: A002 - argparse's word
    *,
    name: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
) -> dict[str, Flag]:
    """The metadata of a field that has a flag, see `Flag`."""
    return {"flag": Flag(help, name, metavar, choices, parse)}


def setting(
    default: T,
    help: str,  # noqa: A002 - argparse's word
    *,
    name: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
) -> T:
    """A field that has a default and a flag, see `Flag`."""
    metadata = described(help, name=name, metavar=metavar, choices=choices, parse=parse)
    return field(default=default, metadata=metadata)


def add_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, settings: type[Any], *names: str
) -> None:
    """Adds the flags of the fields `names` in that order; of all that have one by default."""
    types = get_type_hints(settings)
    known = {each.name: each for each in fields(settings) if "flag" in each.metadata}
    for name in names or known:
        flag: Flag = known[name].metadata["flag"]
        parser.add_argument(
            flag.name or "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=explanation(known[name]).replace("%", "%%"),  # argparse fills in once more
            **_reading(flag, known[name], types[name]),
        )


def given(settings: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, by their names."""
    found = {}
    for each in fields(settings):
        if "flag" in each.metadata and each.name in args:
            value, parse = getattr(args, each.name), each.metadata["flag"].parse
            if parse is not None:
                value = parse(value)
            found[each.name] = tuple(value) if isinstance(value, list) else value
    return found


def explanation(own: Field[Any]) -> str:
    """What a setting is, with its default and its choices filled in."""
    flag: Flag = own.metadata["flag"]
    choices = either(flag.choices) if flag.choices else ""
    filled: str = flag.help % {"default": own.default, "choices": choices}
    return filled


def trust_remote_code_setting() -> Any:
    """Whether code that lies beside a model may run."""
    return setting(
        False, "run code that lies beside the model (auto_map in its config.json): read it before"
    )


def check_choices(settings: Any) -> None:
    """Raises a BesaError if a setting is none of its choices."""
    for each in fields(settings):
        choices = each.metadata["flag"].choices if "flag" in each.metadata else ()
        value = getattr(settings, each.name)
        if choices and value is not None and value not in choices:
            raise BesaError(f"{each.name} {value!r}: choose one of {', '.join(choices)}")


def either(words: Sequence[str]) -> str:
    """a, b or c."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _reading(flag: Flag, own: Field[Any], hint: Any) -> dict[str, Any]:
    """How argparse reads a flag."""
    kind = next((each for each in get_args(hint) if each is not type(None)), hint)
    if get_origin(hint) is tuple and flag.parse is None:
        reading: dict[str, Any] = {"action": "append", "metavar": flag.metavar}
    elif hint is bool:
        return {"action": "store_false" if own.default is True else "store_true"}
    else:
        reading = {"metavar": flag.metavar}
    if flag.parse is None and kind in (int, float, Path):
        reading["type"] = kind
    if own.default is MISSING and own.default_factory is MISSING:
        reading["required"] = True
    return reading
