"""What becomes of Ctrl-C in a long run, and of what libraries raise."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from besa.errors import BesaError, Interrupted, interruptible, one_line


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("\x1b[96mno such model\x1b[0m\nNext steps:"), "no such model"),
        (ValueError(), "the library that reads it gives no reason"),
        (KeyError("rope_theta"), "it lacks rope_theta"),
        (AttributeError("'NoneType' object has no attribute 'get'"), "it has another form"),
        (TypeError("unsupported operand type(s) for +: 'int' and 'str'"), "it has another form"),
        (IndexError("index out of range in self"), "it has another form"),
        (OSError(28, "No space left on device", "a.bin"), "a.bin: No space left on device"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "it is not UTF-8"),
    ],
)
def test_what_a_library_raises_is_one_line_for_people(error: Exception, words: str):
    with pytest.raises(BesaError) as caught, one_line("model/config.json"):
        raise error
    line = str(caught.value)
    assert line.startswith(f"model/config.json: {words}")
    assert line.isprintable()
