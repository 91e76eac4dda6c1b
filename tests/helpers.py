"""What the tests of pruning share: tiny models of every family, checkpoints as bytes, quick runs.

Importing torch and transformers takes seconds, a run on a tiny model does not. So `start` and
`run` fork their `besa` from one process that has imported all of it (`python -m tests.helpers`).
What they start is a process of its own, to be killed, limited and timed like any other.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.agents import Torchrun, become_agent

REPOSITORY = Path(__file__).parents[1]

# Seconds that a test waits for what should come soon: so many that only what hangs takes longer, on
# however slow and busy a machine.
PATIENCE = 900

# --------------------------------------------------------------------------- processes


@dataclass
class Process:
    """A `besa` that runs."""

    command: str
    pid: int
    stdout: Path
    stderr: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"wait": self.pid})["returncode"]
        return self.returncode

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"{self.command} ran for {PATIENCE} s: {self.errors}")
            time.sleep(0.005)
        return code

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Whether `condition` came true before the process ended."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.poll() is not None:
                return bool(condition())
            assert time.monotonic() < deadline, f"{self.command} did nothing: {self.errors}"
            time.sleep(0.001)
        return True

    @property
    def output(self) -> str:
        return self.stdout.read_text()

    @property
    def errors(self) -> str:
        return self.stderr.read_text()


def start(
    *arguments: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    largest_file: int | None = None,
    launch: Torchrun | None = None,
    operations: Mapping[str, Any] | None = None,
    without: Sequence[Path] = (),
) -> Process:
    """Starts `besa ARGUMENTS` in `cwd`; its output goes to files there.

    Args:
        env: what its environment has more.
        largest_file: the bytes that a file of it may have (RLIMIT_FSIZE).
        launch: how torchrun starts it; None: as one process.
        operations: arguments of `tests.faults.operations.watch`, by which it may kill itself.
        without: folders that it finds empty, and cannot write to.
    """
    number = len(list(cwd.glob("stdout-*")))
    stdout, stderr = cwd / f"stdout-{number}", cwd / f"stderr-{number}"
    request = {
        "arguments": [str(argument) for argument in arguments],
        "cwd": str(cwd),
        "env": dict(env or {}),
        "largest_file": largest_file,
        "operations": operations,
        "without": [str(folder) for folder in without],
        "files": [str(stdout), str(stderr)],
        "launch": launch and asdict(launch),
    }
    command = shlex.join(["besa", *request["arguments"]])
    return Process(command, _ask(request)["pid"], stdout, stderr)


def run(*arguments: object, cwd: Path, **options: Any) -> Process:
    """`start`, and its end."""
    process = start(*arguments, cwd=cwd, **options)
    process.wait()
    return process


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return answer


def _serve(requests: IO[str], answers: IO[str]) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    import besa.pruning.run  # noqa: F401

    # That a build lacks them is the installation's tests' affair.
    warnings.filterwarnings("ignore", "no native kernels")
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = {"returncode": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _become_besa(request)
        print(json.dumps(answer), file=answers, flush=True)


def _become_besa(request: Mapping[str, Any]) -> None:
    from besa.cli import main
    from tests.faults.operations import hide, watch

    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        for number, name in enumerate(request["files"], start=1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if request["largest_file"] is not None:
            limit = request["largest_file"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for folder in request["without"]:
            hide(folder)
        if request["operations"] is not None:
            watch(**request["operations"])
        if request["launch"] is None:
            code = main(request["arguments"])
        else:
            code = become_agent(Torchrun(**request["launch"]), request["arguments"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 (what the interpreter itself does at the end)
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ------------------------------------------------------------------------------ full disks


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own with room for `size`."""
    import pytest

    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def fill(directory: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue
    return ballast


# ------------------------------------------------------------------------- checkpoints


def stored(directory: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint by its name in the files."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def same_bytes(a: Any, b: Any) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits."""
    import torch

    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


# Of a run, what is not the same when it is done again.
_COSTS = ("seconds", "peak_memory_bytes", "peak_device_memory_bytes")


def record_of(directory: Path) -> dict[str, Any]:
    """besa.json without times and memory."""
    record: dict[str, Any] = json.loads((directory / "besa.json").read_text())
    for part in (record, *record["blocks"]):
        for name in _COSTS:
            part.pop(name, None)
    return record


def assert_same_record(ours: Path, theirs: Path) -> None:
    """Fails with each place where the records of two runs differ; pytest itself cuts them short."""
    differing = [*_differences("record", record_of(ours), record_of(theirs))]
    assert not differing, "\n".join(differing)


def _differences(place: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours | theirs:
            yield from _differences(
                f"{place}.{key}", ours.get(key, "nothing"), theirs.get(key, "nothing")
            )
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(f"{place}[{index}]", *pair)
    elif ours != theirs:
        yield f"{place}: {ours!r} is not {theirs!r}"


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file whose content may not depend on when it was made."""
    timed = ("log.jsonl", "besa.json", "README.md", "report.html")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name not in timed
    }


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory with its size and time, to see whether one was touched."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
    }


# ------------------------------------------------------------------------- tiny models

VOCABULARY = 257  # a byte is a token, see `byte_tokenizer`

# Some 6,000 letters to calibrate on.
SENTENCES = "".join(f"The {n}th of {n * n} sentences, of {n % 7} kinds.\n" for n in range(150))

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}

# Keyword arguments of each family's config, by its model_type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": False},
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**_LLAMA, "original_max_position_embeddings": 64},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": {**_SIZES, "intermediate_size": 48},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")

_SLIDING = {"head_dim": 8, "sliding_window": 8}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {**_ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_RECURRENT = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_GPT = {key: value for key, value in FAMILIES["gpt2"].items() if key != "initializer_range"}

# More of them, for what is odd in each: how a block is called and what it returns, other mixers
# than attention, latent and shared parts, scalars and convolutions among the weights.
ODD_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {**_LLAMA, **_STATE, "attn_layer_indices": [1]},
    "biogpt": {**_SIZES, "intermediate_size": 48, "pad_token_id": 1},
    "bloom": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    },
    "codegen": {**_GPT, "rotary_dim": 4, "n_ctx": 64},
    "cohere2": {**_LLAMA, **_SLIDING},
    "deepseek_v2": {**_LLAMA, **_SHARED, **_LATENT, "n_group": 2, "topk_group": 1},
    "deepseek_v3": {**_LLAMA, **_SHARED, **_LATENT, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {
        **_LLAMA,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "falcon": {**_SIZES, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon_h1": {
        **_LLAMA,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "gemma3n_text": {
        **_LLAMA,
        **_MIXED,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm4_moe": {**_LLAMA, **_SHARED, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        **_SIZES,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "granitemoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        **_LLAMA,
        **_STATE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
    },
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "minimax": {
        **_LLAMA,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "olmo3": {**_LLAMA, "sliding_window": 8},
    "phi": _LLAMA,
    "phimoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_LLAMA,
        **_ROUTED,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_next": {
        **_LLAMA,
        **_ROUTED,
        **_RECURRENT,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
    },
    "rwkv": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "context_length": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "xglm": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
    # A language model with eyes: only the former is pruned.
    "gemma3": {
        "text_config": FAMILIES["gemma3_text"],
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 256,
        "boi_token_index": 255,
        "eoi_token_index": 254,
    },
}


def byte_tokenizer() -> Any:
    """A tokenizer in which a byte is a token, and an end of text is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    alphabet = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=128
    )


TASK = """
task: own_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def write_task(directory: Path, questions: Sequence[dict[str, Any]]) -> Path:
    """A folder with the task `own_task` of lm-evaluation-harness, which asks these questions."""
    data, folder = directory / "questions.jsonl", directory / "own"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    folder.mkdir()
    (folder / "own.yaml").write_text(TASK.format(data=data))
    return folder


def begin_texts(tokenizer: Any) -> Any:
    """The tiny model's tokenizer, which from now on puts its token 0 before each text."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def random_model(family: str, **changes: Any) -> Any:
    """A tiny model with random weights, norms and biases too.

    A family that is not among the tables begins with Llama's sizes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {**FAMILIES, **ODD_FAMILIES}.get(family, _LLAMA)
        config = AutoConfig.for_model(family, **{**settings, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_with_tokenizer(model: Any, directory: Path, tiny_model: Path, **options: Any) -> Path:
    """Writes a model as transformers does, and `tiny_model`'s tokenizer beside it."""
    model.save_pretrained(directory, **options)
    for path in tiny_model.glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


def load_strictly(directory: Path, loader: Any = None, **options: Any) -> Any:
    """The stock model; no weight is missing, left over or of another shape.

    Args:
        loader: transformers' class that loads it; None for AutoModelForCausalLM.
    """
    from transformers import AutoModelForCausalLM

    loader = loader or AutoModelForCausalLM
    model, info = loader.from_pretrained(directory, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    assert not info.get("error_msgs")
    return model.eval()


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
