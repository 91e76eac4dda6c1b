"""Flags made of a dataclass's fields, and the settings that they give back."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from besa.cli import build_parser
from besa.errors import BesaError
from besa.settings import add_flags, check_choices, described, either, given, setting


def _doubled(text: str) -> int:
    return 2 * int(text)


@dataclass(frozen=True, kw_only=True)
class Brew:
    """Every kind of setting."""

    out: str | Path = field(metadata=described("where to"))
    cups: int = setting(2, "100%% of them (default: %(default)s)", metavar="N")
    heat: float | None = setting(None, "degrees")
    strong: bool = setting(False, "twice the coffee")
    sugar: bool = setting(True, "without sugar", name="--no-sugar")
    beans: tuple[str, ...] = setting(("arabica",), "several times", name="--bean")
    place: Path = setting(Path("kitchen"), "where")
    size: str = setting("small", "%(choices)s", choices=("small", "large"))
    half_cups: int = setting(4, "a text", parse=_doubled)
    unseen: int = 7


def parsed(*words: str) -> Brew:
    parser = argparse.ArgumentParser()
    add_flags(parser, Brew)
    return Brew(**given(Brew, parser.parse_args(["--out", "pot", *words])))


def test_flags_that_are_not_given_leave_the_defaults():
    assert parsed() == Brew(out="pot")


def test_the_type_says_how_a_flag_is_read():
    words = "--cups 3 --heat 9.5 --strong --no-sugar --bean a --bean b --place bed --half-cups 5"
    assert parsed(*words.split()) == Brew(
        out="pot",
        cups=3,
        heat=9.5,
        strong=True,
        sugar=False,
        beans=("a", "b"),
        place=Path("bed"),
        half_cups=10,
    )


def test_help_fills_in_defaults_and_choices():
    parser = argparse.ArgumentParser()
    add_flags(parser, Brew, "cups", "size")
    shown = parser.format_help()
    assert "--cups N" in shown
    assert "100% of them (default: 2)" in shown
    assert "small or large" in shown
    assert "--heat" not in shown


def test_a_setting_without_a_default_is_required(capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    add_flags(parser, Brew)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "--out" in capsys.readouterr().err


def test_a_value_that_is_no_choice_is_named():
    with pytest.raises(BesaError, match="size 'huge': choose one of small, large"):
        check_choices(parsed("--size", "huge"))


def test_either():
    assert either(["a"]) == "a"
    assert either(["a", "b", "c"]) == "a, b or c"


@pytest.mark.parametrize("command", ["prune", "export", "serve", "bench", "eval"])
def test_unknown_flags_go_to_engines_only(command: str):
    """100% and other signs of the help do not break it either."""
    words = {"prune": ["M", "--out", "O"], "export": ["M", "--out", "O"]}.get(command, ["M"])
    args, unknown = build_parser().parse_known_args([command, *words, "--such-a-flag"])
    assert unknown == ["--such-a-flag"]
    assert ("engine_flags" in args) == (command == "serve")
