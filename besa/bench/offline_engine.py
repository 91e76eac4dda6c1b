"""An engine in a process of its own, stepped by hand: `python -m besa.bench.offline_engine`.

python -m besa.bench.offline_engine transformers DIR     # then questions on standard input
{"batch": 4, "prompt": 64, "steps": 16, "seed": 1}       # seconds: {"prefill": …, "steps": […]}
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

from besa.bench.child import answer_questions, redirect_output

Steps = Callable[[list[list[int]], int], tuple[float, list[float], list[int]]]


def in_vllm(directory: str, most: int, longest: int) -> tuple[Steps, int]:
    """vLLM's engine; its cache of prefixes is off, or a second round would not read the prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_tokens=max(most * longest, 2048),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine, count = llm.llm_engine, 0

    def steps(prompts: list[list[int]], length: int) -> tuple[float, list[float], list[int]]:
        nonlocal count
        wish = SamplingParams(
            max_tokens=length + 1, temperature=0, ignore_eos=True, detokenize=False
        )
        for tokens in prompts:
            count += 1
            engine.add_request(str(count), {"prompt_token_ids": tokens}, wish)
        first, each, answered, said = 0.0, [], 0, []
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - started
            if answered < len(prompts):
                first += seconds
                answered = sum(len(one.outputs[0].token_ids) > 0 for one in outputs)
            else:
                each.append(seconds)
            for one in outputs:
                if one.finished and one.request_id == str(count):
                    said = list(one.outputs[0].token_ids)
        return first, each, said

    return steps, llm.model_config.get_vocab_size()


def in_transformers(directory: str, most: int, longest: int) -> tuple[Steps, int]:  # noqa: ARG001
    """The plain model and its cache."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_grad_enabled(False)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(device).eval()

    def steps(prompts: list[list[int]], length: int) -> tuple[float, list[float], list[int]]:
        cache = DynamicCache(config=model.config)
        tokens, times, said = torch.tensor(prompts, device=device), [], []
        for _ in range(length + 1):
            started = time.perf_counter()
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits.argmax(-1)
            said.append(int(tokens[-1, 0]))  # waits for the device
            times.append(time.perf_counter() - started)
        return times[0], times[1:], said

    return steps, model.config.get_text_config().vocab_size


def in_onnx(directory: str, most: int, longest: int) -> tuple[Steps, int]:  # noqa: ARG001
    """ONNX Runtime GenAI, for directories with a genai_config.json."""
    import json
    from pathlib import Path

    import onnxruntime_genai as genai

    from besa.serve.cpu import threads

    # By itself GenAI takes half of what the machine has, be they cores or not.
    options = {"session_options": {"intra_op_num_threads": threads()}}
    own = genai.Config(directory)
    own.overlay(json.dumps({"model": {"decoder": options}}))
    model = genai.Model(own)
    config = json.loads((Path(directory) / "genai_config.json").read_text())

    def steps(prompts: list[list[int]], length: int) -> tuple[float, list[float], list[int]]:
        wish = genai.GeneratorParams(model)
        total = len(prompts[0]) + length + 1
        wish.set_search_options(
            batch_size=len(prompts), max_length=total, min_length=total, do_sample=False
        )
        generator = genai.Generator(model, wish)
        started = time.perf_counter()
        generator.append_tokens(prompts)
        generator.generate_next_token()
        times = [time.perf_counter() - started]
        for _ in range(length):
            started = time.perf_counter()
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
        said = list(generator.get_sequence(len(prompts) - 1))[len(prompts[0]) :]
        return times[0], times[1:], list(map(int, said))

    return steps, int(config["model"]["vocab_size"])


ENGINES = {"vllm": in_vllm, "transformers": in_transformers, "onnx": in_onnx}


def main(engine: str, directory: str, most: int, longest: int) -> None:
    redirect_output()
    started = time.perf_counter()
    steps, vocabulary = ENGINES[engine](directory, most, longest)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        source = random.Random(question["seed"])
        low = min(3, vocabulary - 1)  # the first few are special
        prompts = [
            [source.randrange(low, vocabulary) for _ in range(question["prompt"])]
            for _ in range(question["batch"])
        ]
        first, each, said = steps(prompts, question["steps"])
        return {"prefill": first, "steps": each, "tokens": said}

    answer_questions(answer, first={"start": time.perf_counter() - started})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
