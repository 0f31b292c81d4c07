"""Mixtures of experts on a pretended GPU, its kernels emulated: as a loop over the experts with dense kernels computes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase

from fptquant.errors import FPTQuantError
from fptquant.format import ActivationScheme, DownHadamard, TransformRecord, WeightScheme, pack_codes, round_scale
from fptquant.format.routing import mixture
from tests.families import config_of, family_of
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.layers import quant_config
from vllm_fptquant.config import FPTQuantConfig
from vllm_fptquant.kernels.experts import BLOCKS, block_size, sort_rows
from vllm_fptquant.models.experts import DecoderExperts

pytestmark = pytest.mark.usefixtures("operators", "world", "pretend_gpu")

HIDDEN, WIDTH, EXPERTS, COUNT = 128, 48, 5, 2  # of the tiny families
SCHEMES = {
    "w4a8": (4, ActivationScheme(bits=8)),
    "w4a4": (4, ActivationScheme(bits=4, symmetric=False)),
    "w4a16": (4, ActivationScheme(bits=16)),
    "w8a16": (8, ActivationScheme(bits=16)),
}


@pytest.fixture
def world(parallel_world: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`parallel_world`, for mixtures too."""

    def pretend(rank: int, size: int) -> None:
        parallel_world(rank, size)
        monkeypatch.setattr("vllm_fptquant.models.experts.get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    return pretend


def config(scheme: str, *, scaled: bool = True, **fields: Any) -> FPTQuantConfig:
    bits, activations = SCHEMES[scheme]
    transforms = TransformRecord(down_hadamard=DownHadamard(block=16), residual_scale=scaled)
    return quant_config(weights=WeightScheme(bits=bits), activations=activations, transforms=transforms, **fields)


def build(quantization: FPTQuantConfig, dtype: torch.dtype = torch.bfloat16, variant: str = "qwen2_moe") -> Any:
    """A mixture as vLLM builds it, without weights."""
    model_config = config_of(variant)
    engine = SimpleNamespace(
        quant_config=quantization, parallel_config=SimpleNamespace(enable_expert_parallel=False), additional_config={}
    )
    torch.set_default_dtype(dtype)
    try:
        return DecoderExperts(family_of(variant), model_config, engine, "model.layers.0.mlp")
    finally:
        torch.set_default_dtype(torch.float32)


def projections(built: DecoderExperts) -> list[tuple[str, LinearBase]]:
    return [(name, layer) for name, layer in built.named_modules() if isinstance(layer, LinearBase)]


def fill(built: DecoderExperts, seed: int = 0, input_scale: Callable[[str], float] | None = None) -> DecoderExperts:
    """Random tensors of a checkpoint through the layers' loaders; the same in every mixture. Not prepared yet."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in projections(built):
        fused = "gate_up" in name
        scheme = layer.quant_method.scheme
        limit = 2 ** (scheme.weights.bits - 1)
        scale = 0.03 if fused else 0.005 + 0.02 * float(torch.rand((), generator=generator))
        zero_point = -3 if fused else int(torch.randint(-5, 6, (), generator=generator))
        for shard in (0, 1) if fused else (None,):
            shape = layer.output_size // (2 if fused else 1), layer.input_size
            tensors = {
                "weight_packed": pack_codes(torch.randint(-limit, limit, shape, generator=generator), scheme.weights.bits),
                "weight_scale": round_scale(torch.rand(shape[0], 1, generator=generator) * 0.01 + 1e-3),
                "weight_shape": torch.tensor(shape),
            }
            if scheme.activations.bits < 16:
                tensors["input_scale"] = torch.tensor(scale if input_scale is None else input_scale(name))
                if not scheme.activations.symmetric:
                    tensors["input_zero_point"] = torch.tensor(zero_point, dtype=torch.int32)
            for tensor, value in tensors.items():
                parameter = layer.get_parameter(tensor)
                parameter.weight_loader(parameter, value, *([] if shard is None else [shard]))
    for linear in (built.gate, getattr(built, "shared_expert_gate", None)):
        if linear is not None:
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator).to(linear.weight.dtype)
    return built


def prepare(built: DecoderExperts) -> DecoderExperts:
    for _, layer in projections(built):
        layer.quant_method.process_weights_after_loading(layer)
    built.gate_up.require_one_quantizer()
    return built


def loop(built: DecoderExperts, x: Tensor, scale: Tensor | None, weights: Tensor, chosen: Tensor) -> Tensor:
    """A mixture whose experts are dense layers."""

    def through(number: int, tokens: Tensor) -> Tensor:
        output: Tensor = built.experts[number](x[tokens], None if scale is None else scale[tokens])
        return output.float()

    return mixture(weights, chosen, x.shape[-1], through)


def dense(quantization: FPTQuantConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> DecoderExperts:
    """The same experts as linear layers with the GPU's kernels for those."""
    with monkeypatch.context() as patch:
        patch.setattr("vllm_fptquant.models.experts.current_platform", SimpleNamespace(is_cpu=lambda: True))
        built = fill(build(quantization, dtype))
    for _, layer in projections(built):
        layer.quant_method.process_weights_after_loading(layer)
    return built


def routes(case: str) -> Tensor:
    """Numbers of experts (tokens, COUNT)."""
    generator = torch.Generator().manual_seed(1)
    if case == "one token":
        return torch.tensor([[4, 1]])
    if case == "one expert has no tokens":
        return torch.tensor([0, 1, 3, 4])[torch.rand(40, 4, generator=generator).argsort(-1)[:, :COUNT]]
    if case == "all tokens to the same":
        return torch.tensor([[3, 0]]).repeat(70, 1)
    return torch.rand(230, EXPERTS, generator=generator).argsort(-1)[:, :COUNT]  # several of the largest blocks


ROUTES = ("one token", "one expert has no tokens", "all tokens to the same", "many")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_together_is_one_by_one(
    scheme: str, scaled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit of what an expert puts out; sums of them in float32 differ by their order."""
    quantization = config(scheme, scaled=scaled)
    built, apart = prepare(fill(build(quantization, dtype))), dense(quantization, dtype, monkeypatch)
    assert not any(parameter.numel() for name, parameter in built.experts.named_parameters())
    for case in ROUTES:
        chosen = routes(case)
        x = torch.randn(len(chosen), HIDDEN).to(dtype)
        scale = torch.rand(len(chosen), 1) + 0.5 if scaled else None
        weights = torch.rand(chosen.shape)
        output = built.together(x, scale, weights, chosen)
        expected = loop(apart, x, scale, weights, chosen)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        one = torch.eye(COUNT)[torch.arange(len(chosen)) % COUNT]  # one expert's alone
        assert torch.equal(built.together(x, scale, one, chosen), loop(apart, x, scale, one, chosen))
