"""What becomes of Ctrl-C in a long run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from besa.errors import Interrupted, interruptible


@pytest.fixture(autouse=True)
def _usual_handler() -> Iterator[None]:
    """Of a process that a shell started in the foreground."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_within_a_library() -> None:
    """As where C code asks Python for something and makes its own error of any other."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize("press", [press_within_a_library, lambda: signal.raise_signal(2)])
def test_ctrl_c_says_how_to_go_on(press):
    with pytest.raises(Interrupted, match="interrupted; do it again"), interruptible("do it again"):
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_errors_are_themselves():
    with pytest.raises(ValueError, match="mine"), interruptible("do it again"):
        raise ValueError("mine")


def test_anothers_handler_stays():
    presses = []
    signal.signal(signal.SIGINT, lambda number, _frame: presses.append(number))
    with interruptible("do it again"):
        signal.raise_signal(signal.SIGINT)
    assert presses == [signal.SIGINT]
