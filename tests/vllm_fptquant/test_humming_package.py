"""Our model of Humming against the package itself: its own repacking, and its compiled kernels, executed in numpy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fptquant.format import ActivationScheme, LinearScheme, WeightScheme, pack_codes, round_scale
from tests.vllm_fptquant import ptx
from tests.vllm_fptquant.humming_model import flat_layout, unpack, unpack_input
from tests.vllm_fptquant.humming_package import GPUS, Package, package  # noqa: F401
from vllm_fptquant.kernels import humming as module
from vllm_fptquant.kernels.base import LinearWeights
from vllm_fptquant.kernels.humming import COMPUTE, Humming, HummingInt4Kernel, HummingInt8Kernel, layer_config

pytestmark = pytest.mark.slow

# N, K of the projections as vLLM fuses them: qkv, o, gate and up, down.
PROJECTIONS = {
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "Llama-3.2-3B": [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
    "Qwen2.5-7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
    "Qwen3-8B": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "padded": [(8, 32), (1000, 96), (264, 672)],
}
SHAPES = sorted({shape for shapes in PROJECTIONS.values() for shape in shapes})


@pytest.fixture(autouse=True)
def pretended(package: Package) -> None:  # noqa: F811
    """An A100, until a test asks for another GPU."""
    package.pretend(80)
    layer_config.cache_clear()


def weights_of(bits: int, n: int, k: int, weight_bits: int = 4) -> LinearWeights:
    limit = 2 ** (weight_bits - 1)
    generator = torch.Generator().manual_seed(n + k)
    return LinearWeights(
        scheme=LinearScheme(weights=WeightScheme(bits=weight_bits), activations=ActivationScheme(bits=bits)),
        codes=torch.randint(-limit, limit, (n, k), dtype=torch.int8, generator=generator),
        weight_scale=round_scale(torch.rand(n, generator=generator) * 0.01 + 1e-4),
        input_scale=torch.tensor(0.037),
        input_zero_point=None,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(
    ("kernel", "bits", "weight_bits", "capability"),
    [
        (HummingInt4Kernel, 4, 4, 80),
        (HummingInt8Kernel, 8, 4, 80),
        (HummingInt8Kernel, 8, 4, 90),
        (HummingInt8Kernel, 8, 8, 120),
    ],
)
def test_its_layout_holds_our_codes(
    package: Package,  # noqa: F811
    shape: tuple[int, int],
    kernel: type[Humming],
    bits: int,
    weight_bits: int,
    capability: int,
) -> None:
    """Unpacked in numpy, independently of the package: every code is where the model expects it, padding too."""
    package.pretend(capability)
    n, k = shape
    weights = weights_of(bits, n, k, weight_bits)
    built = kernel(weights, torch.bfloat16)
    config = json.loads(built.config)
    assert (config["shape_n"] - config["pad_shape_n"], config["shape_k"] - config["pad_shape_k"]) == shape
    assert config["shape_n"] % 256 == config["shape_k"] % 128 == 0
    assert config["weight_scale_type"] == "tensor" and config["input_quant_mode"] == "static_tensor"
    assert (config["a_dtype"], config["c_dtype"]) == (kernel.activation_type, "float16")
    for start in range(0, n, 4096):  # a part of the rows at a time: less memory
        codes = rows_of(built.weight, weight_bits, start, min(start + 4096, config["shape_n"]))
        expected = np.full_like(codes, -(2 ** (weight_bits - 1)))
        rows = weights.codes[start : start + 4096].numpy()
        expected[: len(rows), :k] = rows
        assert np.array_equal(codes, expected)
    if n * k <= 2**20:
        words = pack_codes(weights.codes, 4 if weight_bits == 4 else 8)
        assert torch.equal(built.weight, flat_layout(words, weight_bits, config["shape_n"], config["shape_k"]))


def rows_of(weight: Tensor, bits: int, start: int, stop: int) -> Any:
    """Codes of some rows of the padded weight, from Humming's layout."""
    words = weight.numpy().reshape(-1, weight.shape[0], 4)[:, start:stop]
    return unpack(np.ascontiguousarray(words).reshape(stop - start, -1), bits)


def executed(package: Package, kernel: Any, built: Humming, codes: Tensor, capability: int, blocks: int) -> Any:  # noqa: F811
    """What the device code returns for int8 `codes` (M, K): float16 (M, N)."""
    virtual = f"compute_{capability}" + ("a" if capability >= 90 else "")
    program = ptx.Program(package.compile(kernel, virtual).rstrip(b"\0").decode())
    memory = ptx.Memory()
    shape = (codes.shape[0], built.out_features)
    output = memory.place(np.full(shape, np.nan, np.float16))
    inputs, weight, shift, unit = (
        memory.place(tensor.numpy()) for tensor in (built.packed(codes), built.weight, built.shift, built.unit)
    )
    # A, B, C, AS, AS2, BS, BZP, bias, BS2, four for mixtures of experts, descriptors, locks, M, top k, a flag.
    arguments = [inputs, weight, output, shift, 0, unit, 0, 0, 0, 0, 0, 0, 0, 0, 0, shape[0], 1, 0]
    ptx.run(program, memory, arguments, (blocks,), program.constants["SMEM_SIZE"])
    return memory.read(output, shape, np.float16)


def expected_sums(built: Humming, codes: Tensor, weights: LinearWeights) -> Any:
    sums = codes.long().numpy() @ weights.codes.long().numpy().T
    assert np.array_equal(unpack_input(built.packed(codes).numpy(), 4 if built.activation_packing == 2 else 8), codes)
    return (sums.astype(np.float32) * built.shift.numpy()).astype(np.float16)


@pytest.mark.parametrize(
    ("kernel", "bits", "weight_bits", "capability", "cuda"),
    [
        *[(HummingInt4Kernel, 4, 4, capability, (13, 0)) for capability in (80, 86, 89)],
        *[(HummingInt8Kernel, 8, 4, capability, (13, 0)) for capability in (75, 80, 89, 103, 120)],
        (HummingInt8Kernel, 8, 4, 120, (13, 5)),  # widens 4 bits to 8 by an instruction that PTX has since 13.4
        (HummingInt8Kernel, 8, 8, 80, (13, 0)),
        (HummingInt8Kernel, 8, 7, 120, (13, 0)),
    ],
)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 96, 576), (20, 96, 576), (100, 256, 1024)])
def test_its_device_code_computes_the_model(
    package: Package,  # noqa: F811
    kernel: type[Humming],
    bits: int,
    weight_bits: int,
    capability: int,
    cuda: tuple[int, int],
    rows: int,
    n: int,
    k: int,
) -> None:
    """Bit for bit, for sizes with and without padding, one row and several tiles of them, extreme codes included."""
    package.pretend(capability, cuda)
    weights = weights_of(bits, n, k, weight_bits)
    low, high = (int(bound) for bound in weights.bounds)
    codes = torch.randint(low, high + 1, (rows, k), dtype=torch.int8, generator=torch.Generator().manual_seed(rows))
    codes[0], weights.codes[0], weights.codes[1] = low, weights.codes.min(), weights.codes.max()
    built = kernel(weights, torch.float16)
    (chosen,) = (source for above, up_to, _, source in package.kernels(built.config, COMPUTE) if above < rows <= up_to)
    output = executed(package, chosen, built, codes, capability, blocks=3)
    assert np.array_equal(output, expected_sums(built, codes, weights))


@pytest.mark.parametrize("rows", [1, 20])
def test_weights_widened_in_software(package: Package, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:  # noqa: F811
    """Without patched machine code: another layout, made by a CUDA kernel, which is executed here too."""
    monkeypatch.setenv("HUMMING_DISABLE_PATCH_CUBIN", "1")
    monkeypatch.setattr(
        package.transform.ops, "repack_weight", lambda inputs, **options: package.repack(inputs, 80, **options)
    )
    weights = weights_of(8, 96, 576)
    codes = torch.randint(-128, 128, (rows, 576), dtype=torch.int8, generator=torch.Generator().manual_seed(rows))
    built = HummingInt8Kernel(weights, torch.float16)
    (chosen,) = (source for above, up_to, _, source in package.kernels(built.config, COMPUTE) if above < rows <= up_to)
    assert not chosen.use_ldmatrix_dequant
    output = executed(package, chosen, built, codes, 80, blocks=3)
    assert np.array_equal(output, expected_sums(built, codes, weights))


@pytest.mark.parametrize("capability", sorted(GPUS))
@pytest.mark.parametrize("kernel", [HummingInt4Kernel, HummingInt8Kernel])
def test_compiles_and_never_splits_a_sum(package: Package, kernel: type[Humming], capability: int) -> None:  # noqa: F811
    """Machine code for every architecture; split sums would be added as 16-bit numbers."""
    if kernel is HummingInt4Kernel and not 80 <= capability < 90:
        pytest.skip("refused there")
    package.pretend(capability)
    built = kernel(weights_of(4, 6144, 4096), torch.float16)
    kernels = package.kernels(built.config, COMPUTE)
    for _, _, tiles, source in kernels:
        assert not tiles["use_stream_k"] and not source.use_stream_k and not source.use_f16_accum
        assert source.block_shape[2] == source.warp_shape[2]
    real = f"sm_{capability}" + ("a" if capability >= 90 else "")
    for _, _, _, source in (kernels[0], kernels[-1]):
        assert package.compile(source, real)[:4] == b"\x7fELF"


def test_the_plugin_calls_the_real_package(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """All but the launch: the package takes our arguments, and would start a kernel on the tensors we gave it."""
    package.pretend(89)
    gemm = __import__("humming.forward", fromlist=["ops"]).ops
    given: dict[str, Any] = {}

    def launch(**arguments: Any) -> Tensor:
        given.update(arguments)
        return torch.zeros(arguments["inputs"].shape[0], 96, dtype=torch.float16)

    monkeypatch.setattr(gemm, "humming_gemm", launch)
    built = HummingInt4Kernel(weights_of(4, 96, 576), torch.bfloat16)
    codes = built.packed(torch.zeros(2, 576, dtype=torch.int8))
    module._multiply(codes, built.weight, built.unit, built.shift, built.config, 96)
    assert given["inputs"] is codes and given["input_scale"] is built.shift
    assert given["layer_config"] == built.config and given["compute_config"] == COMPUTE
    assert given["bias"] is None and given["locks"] is None
