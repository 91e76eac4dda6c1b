"""Every family of decoders, by every method: what is written is what stock transformers loads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.pytorch_utils import Conv1D

from besa.data.samples import draw_samples
from besa.errors import BesaError
from besa.methods import METHODS
from besa.model.blocks import Linear, expert_count, find_linears
from besa.model.checkpoint import Checkpoint
from besa.model.observe import observe
from besa.model.replay import capture
from besa.pruning.config import PruneConfig
from besa.pruning.patterns import lowest_pruned, n_of_m
from besa.pruning.pipeline import PruneResult
from besa.pruning.run import prune as prune_model
from besa.pruning.scores import InputNorms
from tests.helpers import (
    EXPERTS,
    FAMILIES,
    ODD_FAMILIES,
    VOCABULARY,
    digests,
    load_strictly,
    random_model,
    record_of,
    same_bytes,
    save_with_tokenizer,
    stored,
)

MakeModel = Callable[[str], Path]
families = pytest.mark.parametrize("family", FAMILIES)

SEQLEN = 16
SAMPLES = 4


def test_the_api_is_as_the_package_says():
    import besa
    from besa import PruneConfig as Config
    from besa import PruneResult as Result
    from besa import prune as function

    assert (Config, Result) == (PruneConfig, PruneResult)
    assert callable(function)
    assert callable(besa.prune)


def prune(model: Path, out: Path, calibration: Path, **options: Any) -> PruneResult:
    settings = {"samples": SAMPLES, "seqlen": SEQLEN, "epochs": 1, "device": "cpu", **options}
    return prune_model(model, PruneConfig(out=out, calibration=str(calibration), **settings))


def windows_of(model: Path, calibration: Path) -> Tensor:
    """The calibration that `prune` uses."""
    config = PruneConfig(out="-", samples=SAMPLES, seqlen=SEQLEN)
    return draw_samples(Checkpoint.open(model), str(calibration), config)


def is_prunable(key: str, tensor: Tensor) -> bool:
    """By the names in the files: the matrices of the blocks, but no router and no bias."""
    in_a_block = re.search(r"\b(layers|h)\.\d+\.", key)
    return bool(
        in_a_block and tensor.ndim >= 2 and not re.search(r"router|\.gate\.weight$|_bias$", key)
    )


def inputs_last(family: str, key: str, tensor: Tensor) -> Tensor:
    """A stored matrix with its inputs along the last dimension."""
    transposed = family == "gpt2" or (family == "gpt_oss" and "experts" in key)
    return tensor.mT if transposed else tensor


def mask_in_memory(dense: nn.Module, pruned: nn.Module) -> None:
    """Zeros in `dense` what is zero in `pruned`."""
    with torch.no_grad():
        for ours, theirs in zip(dense.parameters(), pruned.parameters(), strict=True):
            ours *= theirs != 0


@families
@pytest.mark.parametrize("method", METHODS)
def test_output_is_the_source_with_zeros(
    family: str, method: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model, rate = family_model(family), 0.5 if method != "besa" else 0.6
    result = prune(model, tmp_path / "out", calibration, method=method, sparsity=rate)
    before, after = stored(model), stored(result.out)
    assert after.keys() == before.keys()

    weights = zeros = 0
    for key, tensor in after.items():
        if not is_prunable(key, before[key]):
            assert same_bytes(tensor, before[key]), key
            continue
        assert (tensor.dtype, tensor.shape) == (before[key].dtype, before[key].shape)
        kept = tensor != 0
        weights += tensor.numel()
        zeros += int((~kept).sum())
        if method != "sparsegpt":
            assert torch.equal(tensor[kept], before[key][kept]), key
    assert zeros == round(rate * weights)
    found = result.record.sparsity
    assert (found.zeros, found.weights) == (zeros, weights)
    assert result.sparsity == zeros / weights

    for path in model.iterdir():
        if path.suffix != ".safetensors":
            assert (result.out / path.name).read_bytes() == path.read_bytes()

    pruned = load_strictly(result.out)
    tokens = windows_of(model, calibration)
    with torch.no_grad():
        logits = pruned(tokens).logits
        assert logits.isfinite().all()
        dense = load_strictly(model)
        if method != "sparsegpt":
            mask_in_memory(dense, pruned)
            assert torch.equal(dense(tokens).logits, logits)


@families
@pytest.mark.parametrize("update", ["obs", "admm"])
def test_updates_keep_the_masks_and_lower_the_error(
    family: str, update: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model = family_model(family)
    plain = prune(model, tmp_path / "plain", calibration, method="wanda")
    updated = prune(model, tmp_path / "updated", calibration, method="wanda", update=update)
    assert updated.record.sparsity.zeros == plain.record.sparsity.zeros
    assert updated.record.blocks[0].linears == plain.record.blocks[0].linears
    # The first block of both had the same inputs, so it has the same masks.
    before, ours, theirs = stored(model), stored(updated.out), stored(plain.out)
    first = updated.record.blocks[0].name + "."
    prunable = [key for key in ours if key.startswith(first) and is_prunable(key, before[key])]
    assert prunable
    for key in prunable:
        assert torch.equal(ours[key] != 0, theirs[key] != 0), key
    assert any(not torch.equal(ours[key], theirs[key]) for key in prunable)
    error, plain_error = updated.record.blocks[0].error, plain.record.blocks[0].error
    assert error is not None
    assert plain_error is not None
    assert error < plain_error


@families
def test_no_block_is_worse_on_held_out_windows_than_its_masks_alone(
    family: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    check_guard(family_model(family), calibration, tmp_path / "out", "besa", "auto")


def test_weights_are_learned_without_admm_where_that_is_asked_for(
    family_model: MakeModel, calibration: Path, tmp_path: Path
):
    check_guard(family_model("llama"), calibration, tmp_path / "out", "wanda", "learn")


@pytest.mark.parametrize(("pattern", "masks"), [("2:4", {None, "wanda"}), ("unstructured", {None})])
def test_wandas_masks_are_tried_beside_a_learned_choice(
    pattern: str,
    masks: set[str | None],
    family_model: MakeModel,
    calibration: Path,
    tmp_path: Path,
):
    out = tmp_path / "out"
    result = prune(family_model("llama"), out, calibration, pattern=pattern, samples=16)
    for block in result.record.blocks:
        assert block.update is not None
        assert {each.mask for each in block.update.tried} == masks
        best = min(block.update.tried, key=lambda tried: tried.error)
        assert (block.update.chosen, block.update.mask) == (best.update, best.mask)


def check_guard(model: Path, calibration: Path, out: Path, method: str, update: str) -> None:
    """Prunes, and asserts that every block kept the best of what was tried, at its sparsity."""
    result = prune(model, out, calibration, method=method, update=update, samples=16)
    before, after = stored(model), stored(result.out)
    prunable = [key for key, tensor in before.items() if is_prunable(key, tensor)]
    zeros = sum(int((after[key] == 0).sum()) for key in prunable)
    assert zeros == result.record.sparsity.zeros
    assert result.sparsity == 0.5
    for block in result.record.blocks:
        assert block.update is not None
        alone, *others = block.update.tried
        assert alone.update == "none"
        assert [other.update for other in others if not other.step] == ["admm"] * (update == "auto")
        best = min(block.update.tried, key=lambda tried: tried.error)
        assert (block.update.chosen, block.update.step) == (best.update, best.step)
    load_strictly(result.out)


@families
@pytest.mark.parametrize("method", METHODS)
def test_two_of_four_along_the_inputs(
    family: str, method: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model = family_model(family)
    result = prune(model, tmp_path / "out", calibration, method=method, pattern="2:4")
    before, after = stored(model), stored(result.out)
    pruned = [key for key, tensor in before.items() if is_prunable(key, tensor)]
    for key in pruned:
        groups = inputs_last(family, key, after[key]).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all(), key
    assert result.record.sparsity.weights == sum(before[key].numel() for key in pruned)
    assert result.sparsity == 0.5
    load_strictly(result.out)


def hidden_states(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> list[Tensor]:
    """What each block of a model gives when the model is called as usual."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def stock_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()


@pytest.mark.parametrize("family", [*FAMILIES, *ODD_FAMILIES])
def test_replayed_blocks_give_the_models_own_hidden_states(
    family: str, family_model: MakeModel, calibration: Path
):
    model = family_model(family)
    batches = windows_of(model, calibration).split(2)
    checkpoint = Checkpoint.open(model)
    stock = stock_model(model)
    blocks = stock.get_submodule(checkpoint.blocks_name)
    expected = [hidden_states(stock, blocks, tokens) for tokens in batches]
    with torch.no_grad():
        with checkpoint.loaded_base() as base:
            stream, calls = capture(base, checkpoint.blocks, batches)
        for index in range(len(blocks)):
            block = checkpoint.load_block(index)
            stream = [row[index].run(block, x) for row, x in zip(calls, stream, strict=True)]
            checkpoint.unload_block(index)
            for found, wanted in zip(stream, expected, strict=True):
                assert torch.equal(found, wanted[index]), f"block {index}"
        assert all(parameter.is_meta for parameter in checkpoint.model.parameters())


@families
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wandas_masks_are_those_of_the_whole_stock_model(
    family: str, pattern: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    """Each block scored on the output of the pruned ones before it, by hooks and nothing else."""
    model = family_model(family)
    result = prune(model, tmp_path / "out", calibration, method="wanda", pattern=pattern)
    stock, pruned = stock_model(model), stock_model(result.out)
    blocks = stock.get_submodule(result.record.blocks[0].name.rpartition(".")[0])
    tokens = windows_of(model, calibration)
    compared = 0
    for block in blocks:
        squares: dict[nn.Module, Tensor] = {}

        def add(
            module: nn.Module,
            args: Any,
            _output: Any,
            squares: dict[nn.Module, Tensor] = squares,
        ) -> None:
            squares[module] = args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        layers = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
        hooks = [layer.register_forward_hook(add) for layer in layers]
        with torch.no_grad():
            stock(tokens)
        for hook in hooks:
            hook.remove()
        names = {module: name for name, module in stock.named_modules()}
        for layer, total in squares.items():
            transposed = isinstance(layer, Conv1D)
            weight = layer.weight.data.T if transposed else layer.weight.data
            scores = weight.abs() * total.sqrt()
            half = torch.full((len(weight),), weight.shape[1] // 2)
            mask = n_of_m(scores, 2, 4) if pattern == "2:4" else lowest_pruned(scores, half)
            found = pruned.get_submodule(names[layer]).weight.data
            assert torch.equal((found.T if transposed else found) != 0, mask), names[layer]
            compared += 1
        # Experts and all else as besa pruned them: the next block's input is that of the run.
        for (name, ours), theirs in zip(
            block.named_parameters(),
            pruned.get_submodule(names[block]).parameters(),
            strict=True,
        ):
            assert ours.shape == theirs.shape, name
            ours.data.copy_(theirs.data)
    assert compared >= 2 * len(blocks)


@pytest.mark.parametrize("family", EXPERTS)
def test_an_experts_statistics_are_those_of_its_own_tokens(
    family: str, family_model: MakeModel, calibration: Path
):
    model = family_model(family)
    checkpoint = Checkpoint.open(model)
    with checkpoint.loaded_base() as base, torch.no_grad():
        hidden, calls = capture(base, checkpoint.blocks, [windows_of(model, calibration)])
    block = checkpoint.load_block(0)
    linears = find_linears(block, "block", expert_count(checkpoint.config))
    (gate_up,) = (x for x in linears if "gate_up" in x.name)
    (down,) = (x for x in linears if "experts.down" in x.name)
    norms = InputNorms(linears, torch.device("cpu"))
    routed: list[tuple[Tensor, Tensor]] = []
    experts = block.get_submodule(gate_up.name.rpartition(".")[0])
    hook = experts.register_forward_hook(lambda _m, args, _o: routed.append(args[:2]))
    with torch.no_grad(), observe(block, linears, norms.add):
        calls[0][0].run(block, hidden[0])
    hook.remove()

    inputs, chosen = routed[0]
    inputs = inputs.reshape(-1, gate_up.cols)
    assert int(norms.tokens[gate_up.name].sum()) == 2 * len(inputs)  # two experts a token
    assert torch.equal(norms.tokens[gate_up.name], norms.tokens[down.name])
    for expert in range(gate_up.groups):
        own = inputs[(chosen.reshape(len(inputs), -1) == expert).any(1)]
        assert int(norms.tokens[gate_up.name][expert]) == len(own)
        if len(own):
            torch.testing.assert_close(norms.of(gate_up)[expert], own.norm(dim=0))


def shunned(family: str, expert: int) -> Any:
    """A model whose routers never choose `expert`."""
    model = random_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter[expert] = -1e4
            elif name.endswith(("gate.weight", "router.weight")):
                # The first channel is positive throughout: see below.
                parameter[expert] = 0
                parameter[expert, 0] = -1e4
            elif "embed_tokens" in name:
                parameter[:, 0] = 50
            elif name.endswith("norm.weight"):
                parameter.abs_()
    return model


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_named_and_pruned_by_magnitude(
    family: str, method: str, tiny_model: Path, calibration: Path, tmp_path: Path
):
    model = save_with_tokenizer(shunned(family, 2), tmp_path / "model", tiny_model)
    result = prune(model, tmp_path / "out", calibration, method=method)
    assert result.sparsity == 0.5

    fused = [x for x in result.record.blocks[0].linears if "experts" in x.name]
    assert fused
    assert all(2 in linear.unrouted_experts for linear in fused)
    for linear in fused:
        name = f"{result.record.blocks[0].name}.{linear.name}"
        (note,) = (x for x in result.record.notes if x.startswith(name + ":"))
        assert re.search(r"\b2\b.*magnitude", note)

    before, after = stock_model(model), stock_model(result.out)
    for (name, dense), pruned in zip(before.named_parameters(), after.parameters(), strict=True):
        if dense.ndim == 3:
            own, zeroed = dense[2].abs(), pruned[2] == 0
            rows = own.mT if family == "gpt_oss" else own
            gone = zeroed.mT if family == "gpt_oss" else zeroed
            if method in ("magnitude", "sparsegpt"):  # by matrix
                assert own[zeroed].max() <= own[~zeroed].min(), name
            for row, lost in zip(rows, gone, strict=True):  # and so by row
                if lost.any() and not lost.all():
                    assert row[lost].max() <= row[~lost].min(), name
            assert torch.equal(dense[2][~zeroed], pruned[2][~zeroed])


@pytest.mark.slow
@pytest.mark.parametrize("family", ODD_FAMILIES)
def test_odd_families(family: str, family_model: MakeModel, calibration: Path, tmp_path: Path):
    model = family_model(family)
    result = prune(model, tmp_path / "out", calibration)
    before, after = stored(model), stored(result.out)
    assert after.keys() == before.keys()
    changed = [key for key in before if not same_bytes(before[key], after[key])]
    assert all(before[key].ndim >= 2 for key in changed)
    assert not [
        key
        for key in changed
        if re.search(r"(mlp|moe)\.(gate|router)\.|conv1d|conv\.conv|vision", key)
    ]
    for key in changed:
        kept = after[key] != 0
        assert torch.equal(after[key][kept], before[key][kept])
    zeros = sum(int((after[key] == 0).sum()) for key in changed)
    assert zeros == result.record.sparsity.zeros
    assert sum(before[key].numel() for key in changed) == result.record.sparsity.weights
    assert result.sparsity == 0.5
    with torch.no_grad():
        assert load_strictly(result.out)(windows_of(model, calibration)).logits.isfinite().all()


def test_gates_and_coefficients_stay_dense(family_model: MakeModel):
    """Gemma 3n's AltUp mixes 4 streams: linears from 4 to 4, 4 to 16 and 32 to 4."""
    checkpoint = Checkpoint.open(family_model("gemma3n_text"))
    block = checkpoint.blocks[0]
    found = {x.name for x in find_linears(block, "block", expert_count(checkpoint.config))}
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    mixing = {"altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"}
    assert mixing <= linears
    assert found == linears - mixing  # among them some with 8 outputs


# ----------------------------------------------------------------------- what besa cannot prune


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"

    def __init__(self, kind: str = "known", **more: Any) -> None:
        self.kind = kind
        self.vocab_size, self.hidden_size, self.num_hidden_layers = VOCABULARY, 32, 2
        super().__init__(**more)


class StrangeMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mixing


class StrangeBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mixer = StrangeMixer() if kind == "matrix" else nn.Identity()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(self.mixer(hidden)).relu())


class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    base_model_prefix = "model"

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__(config)
        self.kind = config.kind
        self.embed = nn.Embedding(VOCABULARY, 32)
        if self.kind == "no list":
            self.first, self.second = StrangeBlock(self.kind), StrangeBlock(self.kind)
        else:
            self.layers = nn.ModuleList(StrangeBlock(self.kind) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        hidden = self.embed(input_ids)
        blocks = [self.first, self.second] if self.kind == "no list" else list(self.layers)
        for block in blocks * 2 if self.kind == "twice" else blocks:
            hidden = block(hidden)
            if self.kind == "between":
                hidden = hidden + 1
        return BaseModelOutput(last_hidden_state=hidden)


class StrangeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StrangeConfig
    base_model_prefix = "model"

    def __init__(self, config: StrangeConfig) -> None:
        super().__init__(config)
        self.model = StrangeModel(config)
        self.lm_head = nn.Linear(32, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


@pytest.fixture(scope="module")
def strange(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a model of an architecture that nobody knows."""
    AutoConfig.register("strange", StrangeConfig)
    AutoModelForCausalLM.register(StrangeConfig, StrangeForCausalLM)

    def make(kind: str) -> Path:
        torch.manual_seed(0)
        model = StrangeForCausalLM(StrangeConfig(kind))
        return save_with_tokenizer(model, tmp_path_factory.mktemp("strange") / kind, tiny_model)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_an_architecture_that_nobody_knows(
    method: str, strange: MakeModel, calibration: Path, tmp_path: Path
):
    result = prune(strange("known"), tmp_path / "out", calibration, method=method)
    assert result.record.sparsity.weights == 2 * 2 * 64 * 32
    assert result.sparsity == 0.5
    load_strictly(result.out)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("matrix", r"model\.layers\.0\.mixer\.mixing belongs to a StrangeBlock .* not know"),
        ("between", "StrangeModel is not supported: it changes the hidden states between"),
        ("twice", "StrangeModel is not supported: it called 4 of its 2 blocks"),
        ("no list", "StrangeForCausalLM has no list of blocks"),
    ],
)
def test_what_cannot_be_pruned_is_said(
    kind: str, message: str, strange: MakeModel, calibration: Path, tmp_path: Path
):
    with pytest.raises(BesaError, match=message):
        prune(strange(kind), tmp_path / "out", calibration, method="wanda")
    assert not (tmp_path / "out").exists()


def test_an_unknown_matrix_can_be_left_dense_as_advised(
    strange: MakeModel, calibration: Path, tmp_path: Path
):
    model = strange("matrix")
    with pytest.raises(BesaError) as caught:
        prune(model, tmp_path / "out", calibration)
    assert not list(tmp_path.iterdir())
    advised = re.search(r"--exclude '(.*)'", str(caught.value))
    assert advised
    result = prune(model, tmp_path / "out", calibration, exclude=advised[1])
    before, after = stored(model), stored(result.out)
    assert same_bytes(before["model.layers.0.mixer.mixing"], after["model.layers.0.mixer.mixing"])
    assert result.record.sparsity.weights == 2 * 2 * 64 * 32


def test_unknown_matrices_of_a_state_space_model(
    tiny_model: Path, calibration: Path, tmp_path: Path
):
    config = AutoConfig.for_model(
        "mamba", vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2
    )
    made = AutoModelForCausalLM.from_config(config)
    model = save_with_tokenizer(made, tmp_path / "model", tiny_model)
    with pytest.raises(BesaError, match=r"leave it dense with --exclude 'mixer\.A_log'"):
        prune(model, tmp_path / "out", calibration)
    result = prune(model, tmp_path / "out", calibration, exclude="mixer.A_log")
    assert result.sparsity == 0.5
    load_strictly(result.out)


def test_experts_that_nothing_marks_are_pruned_along_their_inputs(
    tiny_model: Path, calibration: Path, tmp_path: Path
):
    settings = {
        **FAMILIES["mixtral"],
        "head_dim": 8,
        "intermediate_size": 16,  # gate and up: 32 by 32, stored [inputs, outputs]
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    }
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **settings))
    model = save_with_tokenizer(made, tmp_path / "model", tiny_model)
    result = prune(model, tmp_path / "out", calibration, pattern="2:4", method="wanda")
    experts = {key: value for key, value in stored(result.out).items() if "experts" in key}
    assert len(experts) == 4
    for key, tensor in experts.items():
        assert ((tensor.mT.reshape(-1, 4) == 0).sum(1) == 2).all(), key
    load_strictly(result.out)


def test_a_layout_that_the_product_contradicts_is_named():
    block = nn.Sequential(nn.Linear(16, 16))
    wrong = Linear("0", "0.weight", groups=1, rows=16, cols=16, transposed=True)
    with (
        pytest.raises(BesaError, match=r"how 0 is laid out.*--exclude '0'"),
        observe(block, [wrong], lambda linear, group, inputs: None),
    ):
        block(torch.ones(2, 16))


# ------------------------------------------------------------------- how checkpoints are stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_in_many_shards(
    dtype: torch.dtype, method: str, tiny_model: Path, calibration: Path, tmp_path: Path
):
    model = save_with_tokenizer(
        random_model("mixtral").to(dtype), tmp_path / "model", tiny_model, max_shard_size="20KB"
    )
    assert len(list(model.glob("*.safetensors"))) > 5
    result = prune(model, tmp_path / "out", calibration, method=method)
    before, after = stored(model), stored(result.out)
    assert after.keys() == before.keys()
    assert all(after[key].dtype == dtype for key in after)
    zeros = 0
    for key, tensor in after.items():
        if is_prunable(key, tensor):
            zeros += int((tensor == 0).sum())
        else:
            assert same_bytes(tensor, before[key])
    assert zeros == result.record.sparsity.zeros == result.record.sparsity.weights / 2
    assert load_strictly(result.out).dtype == dtype


def test_mixed_precision_is_kept(tiny_model: Path, calibration: Path, tmp_path: Path):
    source = save_with_tokenizer(
        random_model("llama").to(torch.bfloat16), tmp_path / "model", tiny_model
    )
    tensors = stored(source)
    for key in tensors:
        if "norm" in key or "down_proj" in key:
            tensors[key] = tensors[key].float() + 1e-3  # more than bfloat16 holds
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = prune(source, tmp_path / "out", calibration, method="wanda")
    after = stored(result.out)
    for key, tensor in tensors.items():
        assert after[key].dtype == tensor.dtype
        if is_prunable(key, tensor):
            kept = after[key] != 0
            assert float(kept.float().mean()) == 0.5
            # A pruned tensor passes through the model's own dtype.
            torch.testing.assert_close(after[key][kept], tensor[kept], rtol=1e-2, atol=1e-2)
        else:
            assert same_bytes(after[key], tensor)


# Names and left-overs that checkpoints on the hub have and the model does not.
OLD = {
    "gpt2": (r"^transformer\.", {"h.0.attn.bias": (1, 1, 64, 64), "h.1.attn.bias": (1, 1, 64, 64)}),
    "llama": (r"^$", {"model.layers.1.self_attn.rotary_emb.inv_freq": (4,)}),
    "gpt_neox": (
        r"^$",
        {
            "gpt_neox.layers.0.attention.bias": (1, 1, 64, 64),
            "gpt_neox.layers.0.attention.masked_bias": (),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,),
        },
    ),
    "opt": (r"^model\.(?=decoder)", {}),
}


@pytest.mark.parametrize("family", OLD)
def test_old_checkpoints_keep_their_names_and_leftovers(
    family: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    prefix, extra = OLD[family]
    source = shutil.copytree(family_model(family), tmp_path / "model")
    tensors = {re.sub(prefix, "", key): value for key, value in stored(source).items()}
    tensors |= {key: torch.full(shape, 0.5) for key, shape in extra.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    result = prune(source, tmp_path / "out", calibration, method="wanda")
    after = stored(result.out)
    assert after.keys() == tensors.keys()
    reference = prune(family_model(family), tmp_path / "new", calibration, method="wanda")
    new = {re.sub(prefix, "", key): value for key, value in stored(reference.out).items()}
    for key, tensor in after.items():
        assert same_bytes(tensor, tensors[key] if key in extra else new[key]), key


# ---------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_include_and_exclude(
    method: str, pattern: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model = family_model("llama")
    result = prune(
        model,
        tmp_path / "out",
        calibration,
        method=method,
        pattern=pattern,
        include=r"layers\.1\.|down_proj",
        exclude=r"v_proj",
    )
    before, after = stored(model), stored(result.out)
    for key, tensor in after.items():
        chosen = is_prunable(key, tensor) and re.search(r"layers\.1\.|down_proj", key)
        if chosen and "v_proj" not in key:
            assert (tensor == 0).any(), key
        else:
            assert same_bytes(tensor, before[key]), key
    assert result.sparsity == 0.5
    first = result.record.blocks[0].linears
    assert [linear.name for linear in first] == ["mlp.down_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_stays_dense(
    method: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    result = prune(
        family_model("llama"), tmp_path / "out", calibration, method=method, exclude=r"layers\.0\."
    )
    first, second = result.record.blocks
    assert (first.weights, first.zeros, first.linears) == (0, 0, ())
    assert first.error == 0
    assert second.sparsity == result.sparsity == 0.5


@pytest.mark.parametrize("rate", [0.001, 1 / 3, 0.61803, 0.9])
def test_any_rate_is_met_to_the_weight(
    rate: float, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    for method in METHODS:
        out = tmp_path / method
        result = prune(family_model("qwen3_moe"), out, calibration, method=method, sparsity=rate)
        after = stored(out)
        zeros = sum(int((t == 0).sum()) for key, t in after.items() if is_prunable(key, t))
        assert zeros == round(rate * result.record.sparsity.weights)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_besas_blocks_are_no_worse_than_wandas(
    family: str, granularity: str, family_model: MakeModel, calibration: Path, tmp_path: Path
):
    result = prune(
        family_model(family),
        tmp_path / "out",
        calibration,
        sparsity=0.5,
        granularity=granularity,
        samples=32,
        epochs=20,
        update="none",
    )
    for block in result.record.blocks:
        assert block.error <= block.error_wanda * 1.001
        assert len(block.loss) == 20
        single = [linear for linear in block.linears if len(linear.shape) == 2]
        spread = [linear.rows.max - linear.rows.min for linear in single]
        # Counts are whole: rows of one rate differ by one weight at most.
        if granularity == "layer":
            assert all(width <= 1 / 16 + 1e-6 for width in spread)


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("besa", "unstructured"),
        ("besa", "2:4"),
        ("wanda", "unstructured"),
    ],
)
def test_an_overflow_in_a_later_batch(method: str, pattern: str, tiny_model: Path, tmp_path: Path):
    """One letter of the text drives a product past float16's range."""
    made = random_model("llama", head_dim=8)
    with torch.no_grad():
        embedding = made.model.embed_tokens.weight
        embedding[:, 0] = 0
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
        rare = AutoTokenizer.from_pretrained(tiny_model)("\u0161")["input_ids"][-1]
        embedding[rare] = 0
        embedding[rare, 0] = 1
        made.model.layers[0].mlp.gate_proj.weight[0, 0] = 200
        made.model.layers[0].mlp.up_proj.weight[0, 0] = 200
    model = save_with_tokenizer(made, tmp_path / "model", tiny_model)
    text = tmp_path / "text.txt"
    text.write_text("Some words, and more. " * 70 + "\u0161" + " And the rest." * 115)
    options = {"samples": 192, "dtype": "float16", "method": method, "pattern": pattern}
    for seed in range(2):
        with pytest.raises(BesaError, match=r"the output of .*0.* NaN or Inf"):
            prune(model, tmp_path / f"out{seed}", text, seed=seed, **options)


def test_the_model_and_torchs_state_are_left_alone(
    family_model: MakeModel, calibration: Path, tmp_path: Path
):
    model = family_model("mixtral")
    before = {path: path.read_bytes() for path in model.iterdir()}
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    prune(model, tmp_path / "out", calibration)
    assert torch.equal(torch.rand(1), expected)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_the_same_run_twice_gives_the_same_bytes(
    family_model: MakeModel, calibration: Path, tmp_path: Path
):
    runs = [prune(family_model("mixtral"), tmp_path / name, calibration, epochs=2) for name in "ab"]
    assert digests(runs[0].out) == digests(runs[1].out)
    assert record_of(runs[0].out) == record_of(runs[1].out)
    other = prune(family_model("mixtral"), tmp_path / "c", calibration, epochs=2, seed=1)
    assert digests(other.out) != digests(runs[0].out)
