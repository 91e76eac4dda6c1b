"""The picture, the sentence and the tables of what benchmarks/serving.py measured.

    python benchmarks/serving_report.py      # benchmarks/results/serving/peers.json -> serving.svg

The sentence goes into README.md and the tables into docs/: `python benchmarks/readme.py`.
"""

from __future__ import annotations

from common import RESULTS
from kernel_report import WIDTH, page

from besa.bench.formatting import FIGURE_NAMES, amount, change
from besa.bench.results import ContenderRecord, Results, read_results
from besa.bench.statistics import Spread
from besa.report.formatting import size
from besa.report.svg import line, linear, tag, text

SHOWN = ("output_tps", "itl_p50", "ttft_p50")
# Those that do not go by the name of their flag.
_ENGINES = {"vllm": "vLLM", "onnx": "ONNX Runtime GenAI"}


def engine_name(engine: str) -> str:
    """What people call an engine."""
    return _ENGINES.get(engine, engine)


def tables(*runs: Results) -> str:
    """A table for each run, and the conditions of all."""
    settings, machine = runs[0].settings, runs[0].machine
    engines = ", ".join(
        f"{engine_name(engine or '')} {version}"
        for engine, version in {
            contender.engine: contender.engine_version
            for results in runs
            for contender in results.contenders
        }.items()
    )
    conditions = (
        f"Medians of {settings.rounds} interleaved rounds of the same greedy requests, "
        f"{settings.input_length} tokens in, {settings.output_length} out; times better than "
        "dense in the same rounds, and the interval that holds it. "
        f"{machine.cpu}, {machine.cores} cores; {engines}, torch {runs[0].versions['torch']}. "
        "`python benchmarks/serving.py --work DIR`."
    )
    return "\n\n".join([*(table(results) for results in runs), conditions])


def table(results: Results) -> str:
    """A row for each contender and load: figures, what they gain over dense, and what it costs."""
    by_name = {contender.name: contender for contender in results.contenders}
    perplexity = any(contender.perplexity for contender in by_name.values())
    heads = [*(FIGURE_NAMES[name] for name in SHOWN), "on disk", "memory"]
    heads += ["perplexity"] * perplexity
    random = any(contender.random_weights for contender in by_name.values())
    title = "TinyLlama's shape, random weights" if random else "the embedded model"
    lines = [f"| {title} | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for measurement, gains in results.by_load():
        contender = by_name[measurement.contender]
        cells = []
        for figure in SHOWN:
            cell = amount(figure, measurement.summary.get(figure))
            if figure in gains:
                cell += f", {change(gains[figure])}"
            cells.append(cell)
        cells += [size(contender.disk_bytes), size(contender.memory.steady)]
        if perplexity:
            assert contender.perplexity is not None
            cells.append(f"{contender.perplexity.perplexity:.2f}")
        row = label(contender) + (f", {measurement.load}" if len(results.loads) > 1 else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def label(contender: ContenderRecord) -> str:
    """The engine and what it serves; a model that besa packed is in bold."""
    name = contender.name.removeprefix("ONNX ").removeprefix("llama.cpp ")
    if contender.packing is not None:
        name = f"**besa {name}**"
    return f"{engine_name(contender.engine or '')}, {name}"


def speed(results: Results) -> str:
    """The paragraph below the picture: its conditions, and what packing gains in vLLM."""
    gains = {measurement.contender: found for measurement, found in results.by_load()}
    machine, settings = results.machine, results.settings

    def both(figure: str) -> str:
        half, int8 = (change(gains[name][figure]) for name in ("50%", "50% int8"))
        return f"{half} in bfloat16 and {int8} in int8"

    return (
        f"A model of TinyLlama's shape, {settings.input_length} tokens in and "
        f"{settings.output_length} out, on {machine.cores} cores ({machine.cpu}, "
        "AVX-512). Its 1.1 billion weights are random: this shows speed, not quality. Lines are "
        f"the intervals that hold the medians of {settings.rounds} rounds. Half of the weights "
        f"against all of them in vLLM, in the same rounds: tokens a second {both('output_tps')}, "
        f"first token {both('ttft_p50')}. [All figures](docs/results.md#serving)."
    )


def plot(results: Results) -> str:
    """Tokens a second, one request at a time: a bar for each contender, by engine."""
    by_name = {contender.name: contender for contender in results.contenders}
    measured = [(by_name[m.contender], m.summary["output_tps"]) for m, _ in results.by_load()]
    by_engine: dict[str, list[tuple[ContenderRecord, Spread]]] = {}
    for contender, value in measured:
        by_engine.setdefault(contender.engine or "", []).append((contender, value))
    left, step, bar = 140.0, 22.0, 15.0
    x = linear(0, max(value.high for _, value in measured), left, WIDTH - 58)
    body, y = text(16, 28, "Output tokens a second, one request at a time", "strong"), 36.0
    for engine, bars in by_engine.items():
        y += 24
        body += text(16, y, engine_name(engine), "small")
        y += 8
        for contender, value in bars:
            own, end = contender.packing is not None, x(value.median)
            name = label(contender).replace("*", "").partition(", ")[2]
            middle = y + bar / 2
            body += text(left - 8, y + 12, name, "end strong" if own else "end")
            size_of = {"width": end - left, "height": bar, "class_": f"f{1 if own else 0}"}
            body += tag("rect", x=left, y=y, rx=2, **size_of)
            body += line(x(value.low), middle, x(value.high), middle, "span")
            shown = f"{value.median:.1f}"
            body += text(max(end, x(value.high)) + 7, y + 12, shown, "strong" if own else "")
            y += step
    height = y + 14
    machine, settings = results.machine, results.settings
    description = (
        f"A model of TinyLlama's shape with random weights, {settings.input_length} tokens in, "
        f"{settings.output_length} out, {machine.cpu}, {machine.cores} cores."
    )
    return page(height, "Serving on two cores", description, body)


def main() -> None:
    results = read_results(RESULTS / "serving" / "peers.json")
    (RESULTS / "serving.svg").write_text(plot(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
