"""NVRTC compiles for every kind of GPU, and says what a kernel needs. No GPU is needed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from besa.kernels.cuda import compiler, driver
from besa.kernels.cuda.compiler import CompileError, Nvrtc, compile_cubin, target_of

TARGETS = ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"]
HEADER = "struct Arguments { float* x; int n; };\nfloat twice(float f) { return 2 * f; }\n"
SOURCE = """
#include "header.cuh"
template <int N>
__global__ void __launch_bounds__(256, 4) scale(const Arguments a) {
    if (threadIdx.x < a.n) a.x[threadIdx.x] = N * twice(a.x[threadIdx.x]);
}
// More values at once than there are registers.
__global__ void __launch_bounds__(256, 4) hold(const Arguments a) {
    float v[200];
    for (int i = 0; i < 200; ++i) v[i] = a.x[i];
    for (int j = 0; j < a.n; ++j)
        for (int i = 0; i < 200; ++i) v[i] *= v[(i + 1) % 200];
    for (int i = 0; i < 200; ++i) a.x[i] = v[i];
}
"""


def compile_scale(target: str) -> compiler.Cubin:
    return compile_cubin(SOURCE, target, "scale<3>", {"header.cuh": HEADER})


@pytest.fixture
def fresh(monkeypatch):
    """The search for NVRTC anew, in this test and in the one after it."""
    compiler.nvrtc.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    compiler.nvrtc.cache_clear()


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_with_a_header(target):
    cubin = compile_scale(target)
    assert cubin.image.startswith(b"\x7fELF")
    assert cubin.symbol.encode() in cubin.image
    assert "scale" in cubin.symbol
    assert 1 < cubin.registers <= 64
    assert cubin.spilled == 0


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target):
    cubin = compile_cubin(SOURCE, target, "hold", {"header.cuh": HEADER})
    assert cubin.spilled > 100
    assert cubin.registers == 64  # 65536 for 4 blocks of 256 threads


@pytest.mark.parametrize("target", TARGETS)
def test_own_headers_compile(target):
    includes = "".join(f'#include "{name}"\n' for name in driver.headers())
    source = includes + "KERNEL(32, 1) nothing(int) {}"
    assert compile_cubin(source, target, "nothing", driver.headers()).spilled == 0


def test_same_source_gives_same_code():
    assert compile_scale("sm_90") == compile_scale("sm_90")


def test_error_names_the_line():
    with pytest.raises(CompileError) as error:
        compile_cubin("\nint y = x;\n", "sm_90", "scale", {}, "pruning.cu")
    message = str(error.value)
    assert "pruning.cu(2): error" in message
    assert '"x" is undefined' in message
    assert "\n" not in message


def test_error_in_a_header_names_it():
    with pytest.raises(CompileError, match=r"header\.cuh\(1\)"):
        compile_cubin(SOURCE, "sm_90", "scale<3>", {"header.cuh": "wrong"})


@pytest.mark.parametrize("name", ["missing<3>", "scale<3", "scale"])
def test_wrong_names(name):
    with pytest.raises(CompileError, match="could not compile"):
        compile_cubin(SOURCE, "sm_90", name, {"header.cuh": HEADER})


def test_unknown_target():
    with pytest.raises(CompileError):
        compile_scale("sm_12")


def nvrtc_of(*architectures: int) -> Nvrtc:
    return Nvrtc(ctypes.CDLL(None), (12, 4), architectures)


@pytest.mark.parametrize(
    ("capability", "known", "target"),
    [
        ((8, 0), (75, 80, 86, 87, 89, 90), "sm_80"),
        ((8, 6), (75, 80, 86, 87, 89, 90), "sm_86"),
        ((8, 9), (75, 80, 86, 87, 89, 90), "sm_89"),
        ((8, 9), (75, 80, 86, 87), "sm_86"),  # 87 is of boards, whose code is theirs alone
        ((8, 7), (75, 80, 86, 87), "sm_87"),
        ((9, 0), (75, 80, 89, 90, 100), "sm_90"),
        ((10, 3), (90, 100, 101, 120), "sm_100"),
        ((12, 1), (90, 100, 120), "sm_120"),
    ],
)
def test_target_is_the_newest_that_fits(capability, known, target):
    assert target_of(capability, nvrtc_of(*known)) == target


def test_specific_target():
    assert target_of((9, 0), nvrtc_of(80, 90), specific=True) == "sm_90a"
    with pytest.raises(CompileError, match=r"12\.4 can't compile for compute capability 10\.3"):
        target_of((10, 3), nvrtc_of(90, 100), specific=True)


@pytest.mark.parametrize("capability", [(9, 0), (12, 0), (13, 0)])
def test_target_of_an_unknown_gpu(capability):
    with pytest.raises(CompileError, match="can't compile for compute capability"):
        target_of(capability, nvrtc_of(75, 80, 86, 89))


def test_without_nvrtc(fresh):
    fresh.setattr(compiler, "candidates", lambda: iter(["libnowhere.so", "/nowhere/libnvrtc.so"]))
    assert compiler.nvrtc() is None
    with pytest.raises(CompileError, match=r"no NVRTC .*: pip install"):
        compile_scale("sm_90")


def wheels(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True)
        file.touch()


@pytest.mark.parametrize(
    ("cuda", "first"),
    [
        ("12.8", "cuda_nvrtc/lib/libnvrtc.so.12"),
        ("13.0", "cu13/lib/libnvrtc.so.13"),
        (None, "cu13/lib/libnvrtc.so.13"),
    ],
)
def test_wheel_of_torchs_cuda_comes_first(fresh, tmp_path, cuda, first):
    wheels(tmp_path, "cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12")
    (tmp_path / "cu13/lib/libnvrtc.alt.so.13").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    fresh.setattr(compiler, "find_spec", lambda name: spec)
    fresh.setattr(compiler, "_loaded", list)
    fresh.setattr(compiler.torch.version, "cuda", cuda)
    found = list(compiler.candidates())
    assert found[0] == str(tmp_path / first)
    assert len([path for path in found if path.startswith(str(tmp_path))]) == 2


def test_no_wheels(fresh):
    fresh.setattr(compiler, "find_spec", lambda name: None)
    fresh.setattr(compiler, "_loaded", list)
    fresh.setenv("CUDA_HOME", "/opt/cuda")
    found = list(compiler.candidates())
    assert found[0] == "libnvrtc.so.13"
    assert "/opt/cuda/lib64/libnvrtc.so" in found


def test_what_is_loaded_is_taken():
    loaded = compiler.nvrtc()
    assert loaded is not None
    first = next(compiler.candidates())
    assert Path(first).name.startswith("libnvrtc.so.")
    assert first in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("cuda", "package"),
    [
        ("13.0", "'nvidia-cuda-nvrtc==13.0.*'"),
        ("12.8", "'nvidia-cuda-nvrtc-cu12==12.8.*'"),
        (None, "nvidia-cuda-nvrtc"),
    ],
)
def test_how_to_install(monkeypatch, cuda, package):
    monkeypatch.setattr(compiler.torch.version, "cuda", cuda)
    assert compiler.how_to_install() == f"pip install {package}"
