"""Where a run of `besa prune` puts what it makes, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Output:
    """A command's model, text and options, and where its output goes."""

    model: Path
    directory: Path
    calibration: Path
    options: list[str] = field(default_factory=list)
    name: str = "out"

    @property
    def out(self) -> Path:
        return self.directory / self.name

    @property
    def partial(self) -> Path:
        return self.directory / f"{self.name}.partial"

    def finished(self, block: int) -> bool:
        return (self.partial / f"block-{block:05d}.finished.json").exists()
