"""Progress where there is no terminal: whole lines, whatever interrupts them."""

from __future__ import annotations

import io
from dataclasses import replace

from besa.model.prune_record import BlockRecord
from besa.progress import REPLAY, WRITTEN, Event, progress_for, steps_for


class Writes(io.StringIO):
    """A file that remembers each write: a signal can be handled between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


RECORD = BlockRecord(
    index=0, name="model.layers.0", sparsity=0.5, linears=(), error=0.1, error_wanda=0.2
)


def test_a_line_and_its_end_are_one_write():
    file = Writes()
    with progress_for(file) as tell:
        tell(Event(REPLAY, block=0, blocks=3, done=1, total=1))
        tell(Event(WRITTEN, block=1, blocks=3, record=RECORD))
    assert file.writes == [
        "block 1/3  finished before, replayed\n",
        "block 2/3  model.layers.0: 50.00% zeros, error 10.000% (Wanda 20.000%), 0 s left\n",
    ]


def test_a_step_is_written_once():
    file = Writes()
    with steps_for(file) as tell:
        for done in range(3):
            tell(Event("pruning", what="wanda", done=done, total=2))
    assert file.writes == ["pruning wanda\n"]


def test_an_event_is_logged_with_what_it_says():
    event = Event("learn", block=0, blocks=3, done=4, total=4, loss=0.0, rate=0.5)
    said = {"block": 0, "blocks": 3, "phase": "learn", "done": 4, "total": 4}
    assert event.as_json() == {**said, "loss": 0.0, "rate": 0.5}
    written = Event(WRITTEN, block=0, blocks=3, record=replace(RECORD, error_wanda=None))
    assert written.as_json()["record"] == {
        "index": 0,
        "name": "model.layers.0",
        "weights": 0,
        "zeros": 0,
        "sparsity": 0.5,
        "linears": [],
        "error": 0.1,
        "error_wanda": None,
        "loss": [],
        "seconds": 0.0,
    }
