"""What only a GPU can show: the kernels there, in graphs, compiled, on streams."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from besa.formats import Packed, pack, quantize_int8
from besa.formats.module import SparseLinear
from besa.kernels.cuda import tuning
from besa.kernels.cuda.call import Call
from besa.kernels.cuda.candidates import Gpu, candidates
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.linear import shape_of
from besa.kernels.cuda.multiply import Multiply
from besa.kernels.cuda.records import padded_cols
from besa.kernels.linear import quantize_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = ["bf16", "fp16", "2:4", "int8", "int8 32", "int8 128", "int8 float"]


def packed_of(kind: str, rows: int, cols: int, density: float = 0.5) -> tuple[Packed, bool]:
    """A random weight on the GPU, and whether its activations are quantized."""
    generator = torch.Generator("cuda").manual_seed(rows + cols)
    weight = torch.randn(rows, cols, device="cuda", generator=generator).mul_(0.02)
    noise = torch.rand(rows, cols, device="cuda", generator=generator)
    if kind == "2:4":
        width = cols // 4 * 4
        ranks = noise[:, :width].view(rows, -1, 4).argsort(2).argsort(2)
        weight[:, :width] *= (ranks < 2).view(rows, width)
        weight[:, width:] = 0
    else:
        weight[noise >= density] = 0
        weight[rows // 2] = 0
    if not kind.startswith("int8"):
        return pack(weight.to(FP16 if kind == "fp16" else BF16)), True
    group = {"int8 32": 32, "int8 128": 128}.get(kind)
    return pack(*quantize_int8(weight, group), group), kind != "int8 float"


def expected_of(packed: Packed, x: Tensor, bias: Tensor | None, int8_input: bool) -> Tensor:
    inputs: Tensor | float = x.double()
    factor: Tensor | float = 1.0
    if packed.scale is not None and int8_input:
        whole, scale = quantize_rows(x)
        inputs, factor = whole.double(), scale.double()
    result = inputs @ packed.unpack(torch.float32).double().T * factor
    return result if bias is None else result + bias.double()


def error_of(y: Tensor, expected: Tensor) -> float:
    value = ((y.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()
    return value if value == value else float("inf")


def layer_of(kind: str, rows: int, cols: int) -> SparseLinear:
    packed, int8_input = packed_of(kind, rows, cols)
    dtype = FP16 if kind == "fp16" else BF16
    bias = nn.Parameter(torch.randn(rows, device="cuda").to(dtype), requires_grad=False)
    layer = SparseLinear(packed, bias, int8_input, dtype).eval()
    assert layer.records is not None
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_every_way(kind: str) -> None:
    worst = {}
    for rows, cols in [(16, 64), (40, 192), (1000, 640), (4090, 330)]:
        layer = layer_of(kind, rows, cols)
        assert layer.records is not None
        packed = layer.packed
        for tokens in (1, 3, 8, 13, 30, 64, 200):
            x = torch.randn(tokens, cols, device="cuda").to(layer.dtype)
            expected = expected_of(packed, x, layer.bias, layer.int8_input)
            shape = shape_of(layer.records, packed.scale, x.dtype, layer.int8_input)
            assert shape is not None
            padded = nn.functional.pad(x, (0, padded_cols(cols) - cols))
            for way in [*candidates(shape, tokens, Gpu.of(x.device)), Expand()]:
                y = torch.full((tokens, rows), torch.nan, device="cuda", dtype=x.dtype)
                call = Call(shape, layer.records.data, layer.records.offsets, packed.scale,
                            layer.bias, padded, y)  # fmt: skip
                way.run(call)
                error = error_of(y, expected)
                worst[str(way)] = max(worst.get(str(way), 0.0), error)
                again = y.clone().fill_(torch.nan)
                way.run(Call(shape, *[getattr(call, n) for n in
                        ("records", "offsets", "scale", "bias", "x")], again))  # fmt: skip
                assert torch.equal(again, y), (way, rows, cols, tokens)
            assert error_of(layer(x), expected) < 5e-3
    assert max(worst.values()) < 5e-3, worst


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_and_memory(kind: str) -> None:
    packed, int8_input = packed_of(kind, 2048, 2048)
    layer = SparseLinear(packed, None, int8_input, BF16)
    assert layer.records is not None
    assert layer.records.nbytes <= 1.03 * (
        packed.nbytes - (packed.scale.nbytes if packed.scale is not None else 0)
    )
    for name in ("values", "bitmask", "row_ptr"):
        assert torch.equal(getattr(layer.packed, name), getattr(packed, name))
    state = layer.state_dict()
    assert torch.equal(state["weight_values"], packed.values)
    on_cpu = copy.deepcopy(layer).to("cpu")
    assert on_cpu.records is None
    assert torch.equal(on_cpu.packed.values, packed.values.cpu())
    assert on_cpu.to("cuda").records is not None


@pytest.mark.parametrize("kind", ["bf16", "2:4", "int8", "int8 128"])
def test_captured_and_on_streams(kind: str) -> None:
    layer = layer_of(kind, 1024, 1024)
    for tokens in (1, 24, 300):
        x = torch.randn(tokens, 1024, device="cuda").to(BF16)
        expected = expected_of(layer.packed, x, layer.bias, layer.int8_input)
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(layer(x))
        graph.replay()
        assert torch.equal(y, layer(layer(x)))
        results = []
        for _ in range(4):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results += [layer(x) for _ in range(8)]
        torch.cuda.synchronize()
        assert all(error_of(y, expected) < 5e-3 for y in results)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled(mode: str) -> None:
    model = nn.Sequential(layer_of("bf16", 512, 512), nn.SiLU(), layer_of("int8", 256, 512))
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 8, 8, 1, 1):
            x = torch.randn(tokens, 512, device="cuda").to(BF16)
            assert error_of(compiled(x), model(x).double()) < 1e-2


def test_other_types_of_activations_are_slow_but_right() -> None:
    layer = layer_of("bf16", 128, 200)
    x = torch.randn(3, 200, device="cuda")
    with pytest.warns(UserWarning, match="float32"):
        y = layer(x)
    assert y.dtype == torch.float32
    assert error_of(y, expected_of(layer.packed, x, layer.bias, True)) < 1e-5


def test_a_capture_before_anything_is_measured() -> None:
    layer = layer_of("bf16", 192, 448)
    tuning._tables.clear()
    x = torch.randn(4, 448, device="cuda").to(BF16)
    layer_usual = Multiply(1, 16, 3, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert layer_usual
    assert error_of(y, expected_of(layer.packed, x, layer.bias, True)) < 5e-3


def test_a_model_that_generates() -> None:
    """With a static cache, which transformers compiles the model for; the dense twin's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    dense = LlamaForCausalLM(config).to("cuda", BF16).eval()
    sparse = LlamaForCausalLM(config).to("cuda", BF16).eval()
    sparse.load_state_dict(dense.state_dict())
    for name, module in list(dense.model.named_modules()):
        if isinstance(module, nn.Linear):
            keep = torch.rand(module.weight.shape, device="cuda") < 0.5
            module.weight.data.mul_(4).mul_(keep)
            layer = SparseLinear(pack(module.weight.data), None, True, BF16)
            sparse.model.set_submodule(name, layer.eval())
    prompt = torch.randint(0, 300, (2, 40), device="cuda")
    with torch.no_grad():
        a, b = dense(prompt).logits, sparse(prompt).logits
        assert error_of(b, a.double()) < 2e-2
        kwargs = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
        tokens = sparse.generate(prompt, **kwargs)
        assert tokens.shape == (2, 52)
        # Near ties may fall the other way, so the dense model is asked about these very tokens.
        logits = dense(tokens).logits[:, 39:-1].float()
        chosen = logits.gather(2, tokens[:, 40:, None])[..., 0]
        assert (logits.amax(2) - chosen).max() < 0.1
