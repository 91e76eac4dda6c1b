"""Runs jobs through the real vLLM engine, one after the other in this process.

    python -m tests.serve.vllm.worker JOBS.json RESULTS.json

A job is {"model": directory, "flags": arguments of vllm.LLM, "adapter": a LoRA's directory or
none, "records": whether weights become records as on a GPU, which the operator multiplies here by
its oracle}; its result {"tokens": …, "logprobs": …} of every prompt, greedily, and the bytes that
each rank's linears and experts hold; or {"error": message}.
vLLM takes ten seconds to import and three for a tiny model, so many jobs share a process.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# vLLM looks for garbage nine times a model, among the million objects of its modules; once does.
collect = gc.collect
gc.collect = lambda generation=2: 0

PROMPTS = [[5, 9, 17, 33, 2], list(range(40, 80))]
NEW_TOKENS = 12


def held(model: Any) -> int:
    """Bytes of the weights of all linears and packed experts in a rank's blocks."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    return sum(
        parameter.nbytes
        for module in model.modules()
        if isinstance(module, LinearBase | RoutedExperts)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith(("weight", "w13_", "w2_")) and not name.endswith("bias")
    )


def generate(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    flags = {"max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True}
    flags |= {"skip_tokenizer_init": True, **job["flags"]}
    flags["kv_cache_memory_bytes"] = 32 << 20
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job.get("adapter") else None
    if adapter:
        flags.update(enable_lora=True, max_lora_rank=8)
    try:
        llm = LLM(job["model"], disable_log_stats=True, **flags)
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in PROMPTS],
                SamplingParams(
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                    logprobs=1,
                    ignore_eos=True,
                    detokenize=False,
                ),
                lora_request=adapter,
                use_tqdm=False,
            )
            weights = None if adapter else llm.apply_model(held)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:  # also where it did not load: what is left would be the next job's
        collect()
        cleanup_dist_env_and_memory()
    completions = [output.outputs[0] for output in outputs]
    return {
        "bytes": weights,
        "tokens": [list(one.token_ids) for one in completions],
        "logprobs": [
            [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
            for one in completions
        ],
    }


@contextmanager
def records_on_the_cpu(wanted: bool) -> Iterator[None]:
    """Meanwhile, weights of 16 or 8 bits become records, if `wanted`."""
    import torch

    from besa.kernels.cuda import linear as gpu

    before = gpu.usable, gpu.tuned
    if wanted:
        gpu.usable = lambda device, values: values != torch.float32
        gpu.tuned = lambda *arguments: None
    try:
        yield
    finally:
        gpu.usable, gpu.tuned = before


def start_ranks_from_one_import() -> None:
    """Ranks begin as forks of a process that has imported vLLM, instead of importing it each."""
    from vllm.v1.executor import multiproc_executor

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["vllm.v1.worker.cpu_worker", "vllm.v1.executor.multiproc_executor"]
    )
    multiproc_executor.get_mp_context = lambda: context


def main(jobs: Path, results: Path) -> None:
    # vLLM learns what each architecture can do in a process of its own, to leave CUDA alone: 10 s.
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    start_ranks_from_one_import()
    done = []
    for job in json.loads(jobs.read_text()):
        try:
            with records_on_the_cpu(job.get("records", False)):
                done.append(generate(job))
        except Exception as error:  # noqa: BLE001 - what a user sees of it is what is tested
            done.append({"error": f"{type(error).__name__}: {error}"})
        results.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
