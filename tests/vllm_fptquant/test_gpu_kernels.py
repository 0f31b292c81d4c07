"""GPU kernels, emulated on the CPU operation by operation: layouts, arithmetic, the whole layer. No GPU is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.format import (
    ActivationScheme,
    DownHadamard,
    InputHadamard,
    LinearScheme,
    TransformRecord,
    WeightScheme,
    block_hadamard,
    code_bounds,
    hadamard_factors,
    quantize,
    quantized_linear,
    round_scale,
)
from fptquant.format.steps import RowScale, Undo
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.gpu_emulation import unpack_gptq
from tests.vllm_fptquant.layers import (
    COLUMNS,
    HIDDEN,
    SHARDS,
    build_linear,
    expected,
    load,
    quant_config,
    random_tensors,
    steps_of,
)
from vllm_fptquant.doctor import steps_apart
from vllm_fptquant.kernels.base import GpuKernel, LinearWeights
from vllm_fptquant.kernels.cutlass_int8 import CutlassInt8Kernel
from vllm_fptquant.kernels.experts import MarlinExperts, MarlinInt8Experts
from vllm_fptquant.kernels.gpu import BlockHadamard, GpuLinear, ScaledInput
from vllm_fptquant.kernels.marlin import MarlinInt8Kernel, MarlinKernel
from vllm_fptquant.kernels.marlin_cutlass import MarlinCutlassKernel
from vllm_fptquant.kernels.triton_int8 import TritonInt8Kernel
from vllm_fptquant.models.projections import project, scaled_projection

KERNELS = [MarlinInt8Kernel, MarlinCutlassKernel, MarlinInt8Experts, CutlassInt8Kernel, TritonInt8Kernel]
DTYPES = [torch.float16, torch.bfloat16]
FOUR, EIGHT, GROUPS = WeightScheme(), WeightScheme(bits=8), WeightScheme(strategy="group", group_size=64)

pytestmark = pytest.mark.usefixtures("operators")


def weights_of(
    bits: int, codes: Tensor, zero_point: int | None = None, scale: float = 0.37, scheme: WeightScheme = FOUR
) -> LinearWeights:
    """A layer with codes (N, K); `zero_point` None means symmetric activations."""
    return LinearWeights(
        scheme=LinearScheme(
            weights=scheme,
            activations=ActivationScheme(bits=bits, symmetric=zero_point is None),
        ),
        codes=codes.to(torch.int8),
        weight_scale=round_scale(torch.rand(len(codes)) * 0.01 + 1e-4),
        input_scale=None if bits == 16 else torch.tensor(scale),
        input_zero_point=None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32),
    )


@st.composite
def layers(draw: st.DrawFn, kernel: type[GpuKernel]) -> tuple[LinearWeights, Tensor]:
    """A random layer that a kernel can compute, and an input that meets its whole range."""
    bits = draw(st.sampled_from([4, 8]))
    limit = 2 ** (bits - 1)
    zero_points = (CutlassInt8Kernel, MarlinInt8Experts)
    symmetric = draw(st.booleans()) if bits == 4 or kernel in zero_points else True
    zero_point = None if symmetric else draw(st.integers(-limit, limit - 1))
    scheme = FOUR if issubclass(kernel, MarlinInt8Kernel) else draw(st.sampled_from([FOUR, GROUPS, EIGHT]))
    step = 16 if kernel in (CutlassInt8Kernel, MarlinCutlassKernel) else 1
    m, k, n = draw(st.integers(1, 20)), step * draw(st.integers(1, 30)), step * draw(st.integers(1, 20))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    top = 2 ** (scheme.code_bits - 1)
    scale = float(torch.tensor(draw(st.floats(1e-3, 10))))
    return weights_of(bits, torch.randint(-top, top, (n, k)), zero_point, scale, scheme), torch.randn(
        m, k
    ) * scale * limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arithmetic(kernel: type[GpuKernel], dtype: torch.dtype, data: st.DataObject) -> None:
    """Integer sums equal the format's; outputs are within one unit in the last place of the 16-bit type."""
    weights, x = data.draw(layers(kernel))
    x = x.to(dtype)
    assert weights.input_scale is not None
    gpu_emulation.split.update(blocks=data.draw(st.integers(1, 4)), warps=data.draw(st.integers(1, 4)))
    gpu_emulation.accumulators.clear()
    undo = data.draw(st.booleans())
    S = torch.rand(len(x), 1) + 0.5
    built = kernel(weights, dtype)
    built.widen_from = data.draw(st.integers(1, 20))  # for the kernel that has two ways
    layer = GpuLinear(built, weights, steps_of(weights, RowScale(), Undo()))
    y = layer(ScaledInput(x, S) if undo else x, None)

    codes = quantize(
        x * S if undo else x, weights.input_scale, *code_bounds(weights.zero_point, weights.scheme.activations.bits)
    )
    sums = codes.double() @ weights.codes.double().T
    (computed,) = gpu_emulation.accumulators
    n = len(weights.codes)
    assert torch.equal(computed[:, :n].double(), sums)
    assert not computed[:, n:].any()  # padding
    expected = quantized_linear(codes.double(), weights.codes.double(), torch.ones(())) * weights.output_scale
    expected = (expected / S if undo else expected).to(dtype)
    close = steps_apart(y, expected) <= 1
    if issubclass(kernel, MarlinInt8Kernel):
        # Parts of the sum are scaled before they are added: where they cancel, float32's rounding of them remains.
        parts = codes.abs() @ weights.codes.abs().float().T * weights.output_scale * 2**-21 / (S if undo else 1)
        close |= (y.float() - expected.float()).abs() <= parts
    assert close.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [MarlinKernel, MarlinExperts])
@pytest.mark.parametrize("scheme", [FOUR, GROUPS, WeightScheme(bits=7), EIGHT], ids=lambda scheme: scheme.label)
@given(st.integers(1, 20), st.integers(1, 400), st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weight_only(
    kernel: type[GpuKernel], scheme: WeightScheme, dtype: torch.dtype, m: int, k: int, n: int, seed: int
) -> None:
    """4-bit weights round twice, others once."""
    torch.manual_seed(seed)
    top = 2 ** (scheme.code_bits - 1)
    weights = weights_of(16, torch.randint(-top, top, (n, k)), scheme=scheme)
    x = torch.randn(m, k).to(dtype)
    y = GpuLinear(kernel(weights, dtype), weights, steps_of(weights))(x, None)
    exact = (x.double() @ weights.codes.double().T) * weights.weight_scale
    assert (steps_apart(y, exact.to(dtype)) <= (2 if scheme == FOUR else 1)).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("bits", "zero_point"), [(8, None), (4, None), (4, 7), (4, -8), (8, 127), (8, -128)])
def test_largest_possible_sums(bits: int, zero_point: int | None, sign: int) -> None:
    weights = weights_of(bits, torch.full((128, 14336), -8), zero_point)
    kernels = [CutlassInt8Kernel] if bits == 8 and zero_point is not None else KERNELS
    assert weights.input_scale is not None
    for kernel in kernels:
        gpu_emulation.accumulators.clear()
        x = torch.full((2, 14336), sign * 1e4)
        GpuLinear(kernel(weights, torch.bfloat16), weights, steps_of(weights))(x, None)
        low, high = weights.bounds
        assert torch.equal(
            gpu_emulation.accumulators[0][:, :128].double(),
            (high if sign > 0 else low).double().expand(2, 128) * 14336 * -8,
        )


# Name, hidden size, query and key/value rows, MLP size.
MODELS = [
    ("Llama-3-8B", 4096, 4096, 1024, 14336),
    ("Llama-3.2-3B", 3072, 3072, 1024, 8192),
    ("Qwen2.5-7B", 3584, 3584, 512, 18944),
    ("Qwen3-8B", 4096, 4096, 1024, 12288),
    ("SmolLM2-135M", 576, 576, 192, 1536),
]
PROJECTIONS = [
    pytest.param(n, k, id=f"{name}-{projection}")
    for name, hidden, query, key, mlp in MODELS
    for projection, n, k in (
        ("qkv", query + 2 * key, hidden),
        ("o", hidden, query),
        ("gate_up", 2 * mlp, hidden),
        ("down", hidden, mlp),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), PROJECTIONS)
def test_marlin_gets_our_codes(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to Marlin's repacking holds the codes, for the projections of real models."""
    handed = {}

    def record(**arguments: Any) -> Tensor:
        handed.update(arguments)
        return torch.empty(0)

    monkeypatch.setattr("vllm_fptquant.kernels.marlin.ops.gptq_marlin_repack", record)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    kernel = MarlinInt8Kernel(weights_of(8, codes), torch.bfloat16)
    assert handed["size_n"] == kernel.padded_n >= n and handed["size_k"] == kernel.padded_k >= k
    assert handed["num_bits"] == 4 and handed["is_a_8bit"] is True
    words = handed["b_q_weight"]
    assert words.is_contiguous() and words.shape == (kernel.padded_k // 8, kernel.padded_n)
    columns = slice(0, n, max(1, n // 512))  # every word of some columns
    unpacked = unpack_gptq(words[:, columns].numpy(), 4)[:k] - 8
    assert (unpacked == codes[columns].T.numpy()).all()
    assert (words[k // 8 :] == -2004318072).all() and (words[:, n:] == -2004318072).all()  # 0x88888888, codes 0
    some = slice(0, k // 8, max(1, k // 8 // 16))  # all columns of some words
    assert (
        unpack_gptq(words[some, :n].numpy(), 4) - 8 == codes.T.reshape(k // 8, 8, n)[some].reshape(-1, n).numpy()
    ).all()


@pytest.mark.parametrize(("n", "k"), [(64, 128), (192, 64), (960, 576), (72, 40), (1, 8)])
@pytest.mark.parametrize("kernel", [MarlinInt8Kernel, MarlinKernel])
def test_marlin_layout(n: int, k: int, kernel: type[MarlinInt8Kernel]) -> None:
    """What tensor cores read is the codes and scales, with and without padding."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    weights = weights_of(8 if kernel is MarlinInt8Kernel else 16, codes)
    built = kernel(weights, torch.float16)
    read = gpu_emulation.unpack_marlin(built.weight.numpy(), built.padded_k, built.padded_n, 4, kernel.int8) - 8
    assert (read[:k, :n] == codes.T.numpy()).all()
    assert not read[k:].any() and not read[:, n:].any()
    scales = gpu_emulation.unpermute_scales(built.weight_scale)[0]
    assert torch.equal(scales[:n].float(), weights.weight_scale) and not scales[n:].any()


@pytest.mark.parametrize("kernel", [MarlinInt8Kernel, MarlinKernel])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_that_16_bits_cannot_hold_is_refused(kernel: type[GpuKernel], dtype: torch.dtype) -> None:
    weights = weights_of(8 if kernel is MarlinInt8Kernel else 16, torch.zeros(64, 64))
    weights.weight_scale[5] = 0.1
    with pytest.raises(FPTQuantError, match=r"layer.weight_scale 0.1\d+ is not exact in b?float16.*cutlass-int8"):
        kernel(weights, dtype)
    CutlassInt8Kernel(weights, dtype)  # takes float32


def exact_tensors(kind: str, config: Any) -> dict[Any, dict[str, Tensor]]:
    tensors = random_tensors(kind, config)
    for shard in tensors.values():
        shard["weight_scale"] = round_scale(shard["weight_scale"])
    return tensors


@pytest.mark.usefixtures("parallel_world", "pretend_gpu")
class TestLayer:
    """vLLM's parallel layers from checkpoint tensors to outputs, on a pretended GPU of capability 8.0."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", list(SHARDS))
    @pytest.mark.parametrize(
        ("kernel", "bits", "symmetric"),
        [
            ("marlin-int8", 8, True),
            ("marlin-int8", 4, True),
            ("marlin-int8", 4, False),
            ("cutlass-int8", 8, False),
            ("cutlass-int8", 4, False),
            ("triton-int8", 8, True),
            ("triton-int8", 4, False),
        ],
    )
    def test_loaded_layer(self, kind: str, kernel: str, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
        config = quant_config(activations=ActivationScheme(bits=bits, symmetric=symmetric))
        tensors = exact_tensors(kind, config)
        layer = build_linear(kind, config, params_dtype=dtype)
        layer.quant_method.kernel_class = next(k for k in KERNELS if k.name == kernel)
        load(layer, tensors)
        assert not any(parameter.numel() for parameter in layer.parameters())
        x = torch.randn(2, 3, COLUMNS[kind]).to(dtype)
        output, bias = layer(x)
        assert bias is None and output.dtype == dtype
        assert (steps_apart(output, expected(tensors, x, bits).to(dtype)) <= 1).all()

    def test_bias(self) -> None:
        config = quant_config()
        tensors = exact_tensors("o", config)
        layer = build_linear("o", config, bias=True, params_dtype=torch.bfloat16)
        layer.bias.data.copy_(torch.randn(HIDDEN))
        load(layer, tensors)
        x = torch.randn(4, COLUMNS["o"]).bfloat16()
        without = expected(tensors, x, 8).bfloat16()
        output, bias = layer(x)
        assert bias is None
        assert (steps_apart(output, without + layer.bias) <= 1).all() and not torch.equal(output, without)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_residual_scale_and_hadamard(self, dtype: torch.dtype, with_bias: bool) -> None:
        config = quant_config(transforms=TransformRecord(down_hadamard=DownHadamard(block=32), residual_scale=True))
        tensors = exact_tensors("down", config)
        layer = build_linear("down", config, params_dtype=dtype, bias=with_bias, skip_bias_add=True)
        if with_bias:
            layer.bias.data.copy_(torch.randn(HIDDEN))
        load(layer, tensors)
        x, S = torch.randn(5, COLUMNS["down"]).to(dtype), torch.rand(5, 1) + 0.3
        product = expected(tensors, block_hadamard(x * S, *hadamard_factors(32)), 8) / S
        plain = product.to(dtype)
        output = scaled_projection(layer, x, S)
        assert output.dtype == dtype
        if with_bias:
            assert torch.equal(output, project(layer, x, S)[0] + layer.bias)
        else:
            assert (steps_apart(output, plain) <= 1).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["qkv", "o", "gate_up"])
    def test_hadamard_of_the_other_groups(self, kind: str, dtype: torch.dtype) -> None:
        """With S as a norm's product, which stays, and without."""
        hadamard = InputHadamard(qkv=64, o=32, gate_up=16)
        config = quant_config(transforms=TransformRecord(input_hadamard=hadamard))
        tensors = exact_tensors(kind, config)
        layer = load(build_linear(kind, config, params_dtype=dtype), tensors)
        factors = hadamard_factors(getattr(hadamard, kind))
        x, S = torch.randn(5, COLUMNS[kind]).to(dtype), torch.rand(5, 1) + 0.3
        for output, states in ((layer(x)[0], x), (project(layer, x, S)[0], x * S)):
            assert output.dtype == dtype
            product = expected(tensors, block_hadamard(states, *factors), 8)
            assert (steps_apart(output, product.to(dtype)) <= 1).float().mean() > 0.99  # a sum that falls on a tie

    def test_scale_that_stays(self) -> None:
        config = quant_config()
        tensors = exact_tensors("qkv", config)
        layer = load(build_linear("qkv", config, params_dtype=torch.bfloat16), tensors)
        x, S = torch.randn(5, HIDDEN).bfloat16(), torch.rand(5, 1) + 0.3
        assert (steps_apart(project(layer, x, S)[0], expected(tensors, x * S, 8).bfloat16()) <= 1).all()

    def test_weight_only_layer_needs_no_scale(self) -> None:
        config = quant_config(activations=ActivationScheme(bits=16), transforms=TransformRecord(residual_scale=True))
        tensors = exact_tensors("down", config)
        layer = load(build_linear("down", config, params_dtype=torch.bfloat16), tensors)
        x, S = torch.randn(5, COLUMNS["down"]).bfloat16(), torch.rand(5, 1) + 0.3
        assert torch.equal(project(layer, x, S)[0], layer(x)[0])
        # Not undone, it is part of the input: a norm.
        layer = load(build_linear("qkv", config, params_dtype=torch.bfloat16), exact_tensors("qkv", config))
        x = torch.randn(5, COLUMNS["qkv"]).bfloat16()
        assert torch.equal(project(layer, x, S)[0], layer((x * S).bfloat16())[0])

    def test_fast_hadamard_rounds_to_16_bits_first(self) -> None:
        config = quant_config(transforms=TransformRecord(down_hadamard=DownHadamard(block=32)))
        tensors = exact_tensors("down", config)
        layer = build_linear("down", config, params_dtype=torch.bfloat16)
        layer.quant_method.fast_hadamard = True
        load(layer, tensors)
        x, S = torch.randn(5, COLUMNS["down"]).bfloat16(), torch.rand(5, 1) + 0.3
        rotated = block_hadamard(x, *hadamard_factors(32)).bfloat16()
        assert (steps_apart(layer(x)[0], expected(tensors, rotated, 8).bfloat16()) <= 1).all()
        scaled = expected(tensors, rotated * S, 8)
        assert (steps_apart(project(layer, x, S)[0], scaled.bfloat16()) <= 1).all()

    def test_batch_invariant_products_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = quant_config(transforms=TransformRecord(down_hadamard=DownHadamard(block=32)))
        layer = build_linear("down", config, params_dtype=torch.bfloat16)
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        with pytest.raises(FPTQuantError, match="VLLM_BATCH_INVARIANT would change the online Hadamard"):
            load(layer, exact_tensors("down", config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 256, 512, 1024, 4096])
def test_hadamard_on_tensor_cores(block: int, dtype: torch.dtype) -> None:
    """As far from float64 as the format's own float32."""
    x = (torch.randn(3, 2 * block) * 100).to(dtype)
    exact = block_hadamard(x, *hadamard_factors(block, torch.float64))
    torch.set_default_dtype(dtype)  # as vLLM does while it loads
    try:
        rotation = BlockHadamard(block, dtype, x.device)
    finally:
        torch.set_default_dtype(torch.float32)
    output = rotation(x)
    assert output.dtype == torch.float32 and output.shape == x.shape
    assert (output - exact).abs().max() <= 1e-6 * exact.abs().max()


TRITON_INTERPRETED = """
import importlib.util, sys, types
import torch, triton, triton.language

package = importlib.util.find_spec("vllm").submodule_search_locations[0]
for name in ("vllm", "vllm.triton_utils", "vllm.triton_utils.allocation"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["vllm.triton_utils"].__dict__.update(
    tl=triton.language, triton=triton, use_tensor_descriptor=lambda wanted: False
)
sys.modules["vllm.triton_utils.allocation"].set_triton_allocator = None
path = package + "/model_executor/layers/quantization/compressed_tensors/triton_scaled_mm.py"
spec = importlib.util.spec_from_file_location("interpreted", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
inputs, outputs = torch.load(sys.argv[1]), []
for codes, weight, row_scale, weight_scale, dtype in inputs:
    outputs.append(module.triton_scaled_mm(
        input=codes, weight=weight.t(), scale_a=row_scale, scale_b=weight_scale, out_dtype=dtype
    ))
torch.save(outputs, sys.argv[1])
"""


def test_triton_emulation_equals_the_kernel(tmp_path: Path) -> None:
    """vLLM's own kernel, run by Triton's interpreter. Not in bfloat16, to which the interpreter truncates."""
    pytest.importorskip("triton")
    inputs = []
    for m, k, n in ((1, 64, 16), (5, 100, 72), (70, 300, 130)):
        for dtype in (torch.float16, torch.float32):
            codes = torch.randint(-128, 128, (m, k), dtype=torch.int8)
            weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
            inputs.append((codes, weight, torch.rand(m) * 1e-3, torch.rand(n) * 1e-2, dtype))
    torch.save(inputs, tmp_path / "products")
    (tmp_path / "interpreted.py").write_text(TRITON_INTERPRETED)
    command = [sys.executable, str(tmp_path / "interpreted.py"), str(tmp_path / "products")]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    for arguments, output in zip(inputs, torch.load(tmp_path / "products"), strict=True):
        assert torch.equal(output, gpu_emulation.triton_int8(*arguments))
