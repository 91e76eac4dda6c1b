"""Trains the small Llama that besa ships, on the text that CPython brings; one on other text; or a
small mixture of experts from the Llama.

    python benchmarks/train_demo.py --out besa/demo/model
    python benchmarks/train_demo.py --out /tmp/second --text wikitext2-valid.txt ptb-valid.txt \
        --untied --steps 1500 --log /tmp/second.jsonl
    python benchmarks/train_demo.py --out /tmp/mixture --init besa/demo/model --experts 8 \
        --steps 1000 --lr 2e-3 --log benchmarks/results/train_mixture.jsonl

The corpus is the `train` split of `besa.data.builtin` and CPython's own test suite where it is
installed (train only). Everything is local: a byte-level BPE tokenizer is trained first, then the
model, AdamW with linear warm-up and linear decay to zero; weights are kept in float32 while they
learn and shipped in bfloat16. One JSON line per logged step goes to `--log`. The second model is to
show that what was chosen on the first one holds elsewhere; the last tenth of each of its texts is
not trained on, and written to `OUT/held-out.txt`.

A mixture is a Mixtral that begins as the dense model ("sparse upcycling", Komatsuzaki et al., arXiv
2212.05055): each expert has a random half of the MLP's units, and two experts read a token. A tenth
of the tokens from scratch would teach so small a mixture next to nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from besa.data.builtin import documents

END = "<|endoftext|>"
SEQLEN = 256

CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": SEQLEN,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def cpython_tests() -> Iterator[str]:
    """CPython's test suite, where the distribution carries it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted((library / "test").rglob("*.py")):
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`; no text is out of its reach."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=SEQLEN
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 stream, an end token after each."""
    end = tokenizer.eos_token_id
    streams = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for stream in streams for token in [*stream, end]])


def batches(stream: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless epochs of shuffled windows, [batch, SEQLEN + 1], cut anew for each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SEQLEN, (1,), generator=generator))
        windows = stream[offset:].unfold(0, SEQLEN + 1, SEQLEN)
        for index in torch.randperm(len(windows), generator=generator).split(batch):
            if len(index) == batch:
                yield windows[index]


@torch.no_grad()
def mixture_of(dense: LlamaForCausalLM, experts: int) -> MixtralForCausalLM:
    """A Mixtral that chooses two experts, each with a random half of the dense MLP's units."""
    config, half = dense.config, dense.config.intermediate_size // 2
    shared = {name: getattr(config, name) for name in CONFIG if name != "intermediate_size"}
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **shared,
            intermediate_size=half,
            num_local_experts=experts,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.01,
            rope_parameters=config.rope_parameters,
        )
    )
    mixture.load_state_dict(dense.state_dict(), strict=False)
    for layer, block in zip(dense.model.layers, mixture.model.layers, strict=True):
        mlp = layer.mlp
        for gate_up, down in zip(
            block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj, strict=True
        ):
            units = torch.randperm(config.intermediate_size)[:half]
            gate_up.copy_(torch.cat([mlp.gate_proj.weight[units], mlp.up_proj.weight[units]]))
            down.copy_(2 * mlp.down_proj.weight[:, units])  # the weights of two experts sum to 1
    return mixture


@torch.no_grad()
def validation_loss(model: PreTrainedModel, stream: torch.Tensor) -> float:
    """Mean nats a token over the first windows of the validation split."""
    windows = stream.unfold(0, SEQLEN, SEQLEN)[:128]
    losses = [model(input_ids=w, labels=w).loss.item() for w in windows.split(16)]
    return sum(losses) / len(losses)


def split(path: Path) -> tuple[str, str]:
    """A text, and its last tenth apart."""
    text = path.read_text(encoding="utf-8")
    place = text.index("\n", len(text) * 9 // 10)
    return text[:place], text[place:]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a bfloat16 copy of the model and the tokenizer."""
    weights = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    copy = type(model)(type(model.config)(**model.config.to_diff_dict())).to(torch.bfloat16)
    copy.load_state_dict(weights, strict=False)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=Path("benchmarks/results/train_demo.jsonl"))
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on instead")
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--init", type=Path, help="go on from these weights, not from scratch")
    parser.add_argument("--experts", type=int, help="a mixture of so many, of which --init is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.experts and not args.init:
        parser.error("--experts needs --init, the dense model")
    torch.manual_seed(args.seed)

    if args.text:
        texts, rest = map(list, zip(*map(split, args.text), strict=True))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "held-out.txt").write_text("\n\n".join(rest), encoding="utf-8")
    else:
        texts, rest = [*documents("train"), *cpython_tests()], list(documents("validation"))
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init, model_max_length=SEQLEN)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        if args.experts:
            model = mixture_of(model, args.experts)
    else:
        tokenizer = train_tokenizer(texts)
        config = LlamaConfig(**{**CONFIG, "tie_word_embeddings": not args.untied})
        model = LlamaForCausalLM(config)
    model.to(args.device)
    stream = tokens_of(tokenizer, texts)
    held_out = tokens_of(tokenizer, rest).to(args.device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    warmup = args.steps // 50 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, (args.steps - s) / (args.steps - warmup)),
    )
    args.log.parent.mkdir(parents=True, exist_ok=True)
    log = args.log.open("a")
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "train_tokens": len(stream),
                "seen_tokens": args.steps * args.batch * SEQLEN,
                "init": str(args.init) if args.init else None,
                "experts": args.experts,
                "steps": args.steps,
                "batch": args.batch,
                "seqlen": SEQLEN,
                "lr": args.lr,
                "seed": args.seed,
                "torch": torch.__version__,
            }
        ),
        file=log,
        flush=True,
    )

    # Of a mixture the balance of its experts is part of the loss, and which tokens an expert reads
    # differs by batch.
    options = {"output_router_logits": True} if args.experts else {}
    if not args.experts:
        model.compile(dynamic=False)
    start, running = time.monotonic(), 0.0
    for step, window in enumerate(
        islice(batches(stream, args.batch, args.seed), args.steps), start=1
    ):
        window = window.to(args.device)
        loss = model(input_ids=window, labels=window, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running += loss.item()
        if not math.isfinite(running):
            raise SystemExit(f"step {step}: the loss is not finite")
        if step % 100 == 0 or step == args.steps:
            seconds = time.monotonic() - start
            row = {"step": step, "loss": round(running / 100, 4), "seconds": round(seconds)}
            if step % 500 == 0 or step == args.steps:
                row["validation_loss"] = round(validation_loss(model, held_out), 4)
            print(json.dumps(row), file=log, flush=True)
            running = 0.0
        if step % 500 == 0:  # a look at the way there; the last save is the one that counts
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
