"""Damages models in a thousand ways and more: python -m tests.fuzz --count 1000 (`make fuzz`).

Each seed is one damaged file. The last lines say how many were refused, how many loaded as before,
and of how many only a number had changed, which the digests tell; any other outcome is printed, and
is the exit code.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.models import make_models
from tests.fuzz.outcome import outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--verbose", action="store_true", help="each seed's outcome")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, bad = Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        for seed in range(args.first, args.first + args.count):
            each = outcome(models, seed, Path(folder))
            found[Path(each.damage.file).suffix, each.result] += 1
            bad += not each.is_good
            if args.verbose or not each.is_good:
                print(each, flush=True)
    for (suffix, result), count in sorted(found.items()):
        print(f"{suffix:14}{result:10}{count:6}")
    print(f"{args.count} damaged files, {bad} with an outcome that must not be")
    return min(bad, 1)


if __name__ == "__main__":
    raise SystemExit(main())
