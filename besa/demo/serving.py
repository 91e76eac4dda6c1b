"""What `besa demo` ends with: the pruned model packed, served beside the dense one, and measured.

It packs what BESA left of the embedded model, and is one run of `besa bench` on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from besa.bench.events import OnEvent, Step, ignore
from besa.bench.generator import installed
from besa.bench.load import Load
from besa.bench.output import write_results
from besa.bench.results import Results
from besa.bench.settings import BenchConfig, Contender
from besa.demo import MODEL
from besa.errors import BesaError
from besa.serve.engines import engine_named

_ENGINE = "transformers"  # which starts in seconds, and everywhere alike


def serve_and_measure(pruned: Path, out: Path, on_event: OnEvent = ignore) -> Results:
    """Packs `pruned` and measures it against the embedded model; writes `out`/packed and bench.

    Returns:
        The results, as `besa bench` has them. Measured inside the engine where no server or no
        load generator is installed; an event says so.
    """
    from besa.export import ExportConfig, export

    packed = export(pruned, ExportConfig(out=out / "packed", overwrite=True)).out
    config = BenchConfig(
        contenders=(Contender("dense", str(MODEL)), Contender("packed 50%", str(packed))),
        loads=(Load("concurrency", 1),),
        engine=_ENGINE,
        input_length=64,
        output_length=32,
        requests=4,
        quality=False,  # the demo's own table has it
    )
    if (missing := _missing()) is None:
        from besa.bench.run import bench

        results = bench(config, on_event)
    else:
        from besa.bench.offline import bench_offline

        on_event(Step(f"{missing}: measured without a server"))
        results = bench_offline(config, (1,), on_event)
    shutil.rmtree(out / "bench", ignore_errors=True)
    write_results(results, out / "bench")
    return results


def _missing() -> str | None:
    """What a server or its load would need, in a few words; None if all is there."""
    try:
        engine_named(_ENGINE).check()
    except BesaError as error:
        return str(error)
    if not installed():
        return "no load generator is installed (pip install 'besa[bench]')"
    return None
