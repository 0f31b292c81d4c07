"""Mixtures of experts on a pretended GPU, its kernels emulated: as a loop over them with dense kernels computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError
from fptquant.format import (
    ActivationScheme,
    DownHadamard,
    InputHadamard,
    TransformRecord,
    WeightScheme,
    pack_codes,
    round_scale,
)
from fptquant.format.routing import mixture
from tests.families import config_of, family_of
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.layers import quant_config
from tests.vllm_fptquant.test_gpu_kernels import weights_of
from tests.vllm_fptquant.test_gpu_tracing import Recorder, SoundCheckpoint, move_to_fake_cuda
from vllm_fptquant.config import FPTQuantConfig
from vllm_fptquant.doctor import steps_apart
from vllm_fptquant.kernels.experts import BLOCKS, MarlinInt8Experts, block_size, sort_rows, zero_point_columns
from vllm_fptquant.models.experts import DecoderExperts

pytestmark = pytest.mark.usefixtures("operators", "world", "pretend_gpu")

HIDDEN, WIDTH, EXPERTS, COUNT = 128, 48, 5, 2  # of the tiny families
SCHEMES = {
    "w4a8": (4, ActivationScheme(bits=8)),
    "w4a8 asymmetric": (4, ActivationScheme(bits=8, symmetric=False)),
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


def config(scheme: str, *, scaled: bool = True, rotated: bool = False, **fields: Any) -> FPTQuantConfig:
    bits, activations = SCHEMES[scheme]
    rotation = InputHadamard(gate_up=32) if rotated else None
    transforms = TransformRecord(down_hadamard=DownHadamard(block=16), input_hadamard=rotation, residual_scale=scaled)
    return quant_config(weights=WeightScheme(bits=bits), activations=activations, transforms=transforms, **fields)


def build(quantization: FPTQuantConfig, dtype: torch.dtype = torch.bfloat16, variant: str = "qwen2_moe") -> Any:
    """A mixture as vLLM builds it, with random routers and nothing else yet."""
    model_config = config_of(variant)
    engine = SimpleNamespace(
        quant_config=quantization, parallel_config=SimpleNamespace(enable_expert_parallel=False), additional_config={}
    )
    torch.set_default_dtype(dtype)
    try:
        built = DecoderExperts(family_of(variant), model_config, engine, "model.layers.0.mlp")
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for router in (built.gate, getattr(built, "shared_expert_gate", None)):
        if router is not None:
            router.requires_grad_(False).weight.copy_(torch.randn(router.weight.shape, generator=generator).half())
    return built


def projections(built: DecoderExperts) -> list[tuple[str, LinearBase]]:
    return [(name, layer) for name, layer in built.named_modules() if isinstance(layer, LinearBase)]


def fill(built: DecoderExperts, seed: int = 0, input_scale: Callable[[str], float] | None = None) -> DecoderExperts:
    """Random tensors of a checkpoint through the layers' loaders; the same in every mixture. Not prepared yet."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in projections(built):
        fused = "gate_up" in name
        scheme = layer.quant_method.scheme
        limit = 2 ** (scheme.weights.bits - 1)
        step = 0.5 if fused else 0.02 + 0.06 * float(torch.rand((), generator=generator))
        scale = step / 2**scheme.activations.bits * 16
        zero_point = -3 if fused else int(torch.randint(-5, 6, (), generator=generator))
        zero_point *= 2**scheme.activations.bits // 16
        for shard in (0, 1) if fused else (None,):
            shape = layer.output_size // (2 if fused else 1), layer.input_size
            codes = torch.randint(-limit, limit, shape, generator=generator)
            tensors = {
                "weight_packed": pack_codes(codes, scheme.weights.bits),
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
@pytest.mark.parametrize("transforms", ["scaled", "rotated", "scaled and rotated", "neither"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_together_is_one_by_one(
    scheme: str, transforms: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit of what an expert puts out; sums of them in float32 differ by their order."""
    scaled = "scaled" in transforms
    quantization = config(scheme, scaled=scaled, rotated="rotated" in transforms)
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
        if scheme != "w4a8 asymmetric":
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        one = torch.eye(COUNT)[torch.arange(len(chosen)) % COUNT]  # one expert's alone
        output, expected = built.together(x, scale, one, chosen), loop(apart, x, scale, one, chosen)
        if scheme == "w4a8 asymmetric":  # dense layers have another kernel for it
            assert (steps_apart(output.to(dtype), expected.to(dtype)) <= 2).float().mean() > 0.99
        else:
            assert torch.equal(output, expected)


def test_wide_inputs_of_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a budget chooses them: 4 bits into gate and up, 8 bits, symmetric, into down."""
    wide = {"modules": r"re:model\.layers\.0\.mlp\.experts\.\d+\.down_proj$", "activations": {"bits": 8}}
    quantization = config("w4a4", overrides=[wide])
    built = prepare(fill(build(quantization)))
    assert built.gate_up.adds_zero_point == built.down.adds_zero_point is False
    chosen, x, scale = routes("many"), torch.randn(230, HIDDEN).bfloat16(), torch.rand(230, 1) + 0.5
    one = torch.eye(COUNT)[torch.arange(230) % COUNT]
    expected = loop(dense(quantization, torch.bfloat16, monkeypatch), x, scale, one, chosen)
    assert torch.equal(built.together(x, scale, one, chosen), expected)
    narrow = prepare(fill(build(config("w4a4"))))
    assert not torch.equal(narrow.together(x, scale, one, chosen), expected)


@contextmanager
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU is pretended."""
    with monkeypatch.context() as patch:
        for target, _ in gpu_emulation.pretended_platform(80):
            patch.setattr(target, current_platform)
        yield


@pytest.mark.parametrize("variant", ["qwen2_moe", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a8 asymmetric", "w4a4"])
def test_as_on_cpus(scheme: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Router, T_h, shared expert and S included: what the CPU computes in float32, but for 16-bit numbers."""
    with on_cpu(monkeypatch):
        exact = fill(build(config(scheme, rotated=True), torch.float32, variant))
        for _, layer in projections(exact):
            layer.quant_method.process_weights_after_loading(layer)
    built = prepare(fill(build(config(scheme, rotated=True), torch.float16, variant)))
    for mixed in (exact, built):
        mixed.gate.weight[1] = mixed.gate.weight[3]  # a tie for every token
    torch.manual_seed(0)
    x, scale = torch.randn(60, HIDDEN).half(), torch.rand(60, 1) + 0.5
    expected, output = exact(x.float(), scale), built(x, scale)
    assert output.dtype == torch.float16

    def error(output: Tensor) -> float:
        return float((output.float() - expected).norm() / expected.norm())

    tolerance = 0.05 if scheme == "w4a4" else 0.01  # some codes of what down projections read fall the other way
    assert error(output) < tolerance, error(output)
    assert error(built(x, scale * 1.1)) > 2 * tolerance
    unrotated = prepare(fill(build(config(scheme), torch.float16, variant)))
    unrotated.gate.weight[1] = unrotated.gate.weight[3]
    assert error(unrotated(x, scale)) > 2 * tolerance
    built.down.stacked["input_scale"].copy_(built.down.stacked["input_scale"].roll(1))
    assert error(built(x, scale)) > 2 * tolerance  # another expert's quantizer


@pytest.mark.parametrize("scheme", ["w4a8 asymmetric", "w4a16"])
def test_one_graph_for_any_number_of_tokens(scheme: str) -> None:
    """And for any size of blocks, though it differs."""
    torch._dynamo.reset()
    built = prepare(fill(build(config(scheme))))
    recorder = Recorder()
    compiled = torch.compile(built.forward, backend=recorder, fullgraph=True, dynamic=True)
    sizes = (2, 40, 230)
    assert len({block_size(rows * COUNT, EXPERTS) for rows in sizes}) == len(sizes)
    for rows in sizes:
        x, scale = torch.randn(rows, HIDDEN).bfloat16(), torch.rand(rows, 1) + 0.5
        assert torch.equal(compiled(x, scale), built(x, scale))
    assert len(recorder.graphs) == 1


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_fake_cuda(scheme: str, fast: bool, dtype: torch.dtype) -> None:
    """Loading and computing on a GPU without one: nothing is left on the CPU, and no value is asked for."""
    from fptquant.format import hadamard_factors

    hadamard_factors(16)  # cached: must not become fake
    built = fill(build(config(scheme), dtype))
    with FakeTensorMode(allow_non_fake_inputs=True), SoundCheckpoint(()) as checkpoint:
        for name, layer in projections(built):
            layer.quant_method.fast_hadamard = fast
            rows = layer.output_size // (2 if "gate_up" in name else 1)
            checkpoint.sizes = iter((rows, layer.input_size) * (2 if "gate_up" in name else 1))
            move_to_fake_cuda(layer)
            layer.quant_method.process_weights_after_loading(layer)
            assert next(checkpoint.sizes, None) is None
        for router in (built.gate, built.shared_expert_gate):
            router.weight = torch.nn.Parameter(torch.empty(router.weight.shape, dtype=dtype, device="cuda"))
        for name, buffer in built.named_buffers():
            assert isinstance(buffer, FakeTensor) and buffer.device.type == "cuda", name
        x, scale = torch.empty(7, HIDDEN, dtype=dtype, device="cuda"), torch.empty(7, 1, device="cuda")
        for given in (scale, None):
            output = built(x, given)
            assert output.device.type == "cuda" and output.dtype == dtype and output.shape == x.shape


def test_buffers_stay_where_they_are() -> None:
    """CUDA graphs hold their addresses while vLLM loads other weights."""
    built = build(config("w4a4"))
    record_metadata_for_reloading(built)
    prepare(fill(built))
    chosen, x, scale = routes("many"), torch.randn(230, HIDDEN).bfloat16(), torch.rand(230, 1) + 0.5
    arguments = x, scale, torch.rand(chosen.shape), chosen
    first, before = built.together(*arguments), dict(built.named_buffers())
    places = {name: buffer.data_ptr() for name, buffer in before.items()}
    initialize_layerwise_reload(built)
    fill(built, seed=1)
    finalize_layerwise_reload(built, None)
    assert {name: buffer.data_ptr() for name, buffer in built.named_buffers()} == places
    assert all(buffer is before[name] for name, buffer in built.named_buffers())
    fresh = prepare(fill(build(config("w4a4")), seed=1))
    assert torch.equal(built.together(*arguments), fresh.together(*arguments))
    assert not torch.equal(built.together(*arguments), first)


def test_ranks_add_up(world: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a part of every expert."""
    quantization = config("w4a8")
    chosen, x, scale = routes("many"), torch.randn(230, HIDDEN).half(), torch.rand(230, 1) + 0.5
    transforms = TransformRecord(down_hadamard=DownHadamard(block=8), residual_scale=True)
    quantization = quant_config(weights=WeightScheme(), activations=SCHEMES["w4a8"][1], transforms=transforms)
    outputs = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        world(rank, size)
        built = prepare(fill(build(quantization, torch.float16)))
        assert built.split == (size > 1)
        outputs.append(built.together(x, scale, torch.ones(chosen.shape), chosen))
    whole, *parts = outputs
    assert ((sum(parts) - whole).norm() / whole.norm()) < 1e-3
    assert ((2 * parts[0] - whole).norm() / whole.norm()) > 0.1
    with pytest.raises(FPTQuantError, match="experts.0.down_proj: tensor-parallel size 2 leaves 24 input features"):
        build(config("w4a8"))  # T_d in blocks of 16


@pytest.mark.parametrize("routes_count", [1, 100, 1000])
def test_size_of_blocks(routes_count: int) -> None:
    """The largest that are nearly full, as each expert has the same number of rows."""
    for experts in (4, 8, 60, 128):
        size = block_size(routes_count, experts)
        assert size in BLOCKS
        smaller = [block for block in BLOCKS if block < size]
        assert all(routes_count / experts >= 0.9 * block for block in smaller)


def test_sorted_rows() -> None:
    chosen = routes("many").int()
    size = block_size(chosen.numel(), EXPERTS)
    routed = sort_rows(chosen, EXPERTS)
    used = int(routed.used)
    blocks = routed.rows[:used].view(-1, size)
    there = blocks < chosen.numel()
    assert sorted(blocks[there].tolist()) == list(range(chosen.numel()))
    experts = routed.experts[: len(blocks)].repeat_interleave(size).view(blocks.shape)
    assert torch.equal(chosen.flatten()[blocks[there].long()], experts[there])


FIRST = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"ignore": [f"{FIRST}.3.down_proj"]}, rf"^{FIRST}.down_proj: on GPUs all experts .* quantized, and alike: "),
        ({"ignore": [r"re:.*\.mlp\.experts\..*"]}, rf"^{FIRST}.gate_up_proj: on GPUs all experts"),
        (
            {"overrides": [{"modules": r"re:.*\.experts\.2\..*", "activations": {"bits": 4}}]},
            rf"^{FIRST}.gate_up_proj: on GPUs all experts",
        ),
        (
            {"weights": {"bits": 8}},
            rf"^no kernel can compute {FIRST}.0.gate_proj, .*marlin-int8-experts: multiplies int8 activations by 4-bit",
        ),
        (
            {"weights": {"bits": 8}, "activations": {"bits": 8, "symmetric": False}},
            rf"^no kernel can compute {FIRST}.0.gate_proj, .*marlin-int8-experts: multiplies int8 activations by 4-bit",
        ),
    ],
)
def test_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(FPTQuantError, match=match):
        build(quant_config(**{"activations": {"bits": 8}, **fields}))


def test_kernel_of_other_layers_is_refused(serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"kernel": "triton-int8"}})
    message = (
        f"'triton-int8' cannot compute {FIRST}.0.gate_proj, .*: computes no experts; kernels that can: marlin-int8-e"
    )
    with pytest.raises(FPTQuantError, match=message):
        build(config("w4a8"))


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 37, 127])
def test_zero_point_becomes_columns(zero_point: int) -> None:
    """Sums of rows as they are in models, and the largest; beyond, it is refused."""
    codes = torch.randint(-7, 8, (200, 768))
    codes[0], codes[1] = 0, torch.tensor([0, 1] * 384)
    weights = weights_of(8, codes, zero_point)
    inputs, columns = zero_point_columns(weights)
    assert inputs.dtype == columns.dtype == torch.int8 and columns.abs().max() <= 8 and columns.max() <= 7
    assert torch.equal(columns.long() @ inputs.long(), -zero_point * codes.sum(1))
    codes[2] = 7
    if abs(zero_point) > 1:
        with pytest.raises(FPTQuantError, match=r"^layer: its zero point times the sum of a row of weights"):
            MarlinInt8Experts(weights_of(8, codes, zero_point), torch.float16)


def test_one_input_has_one_quantizer() -> None:
    built = fill(build(config("w4a8")), input_scale=lambda name: 0.02 if name == "experts.3.gate_up_proj" else 0.01)
    with pytest.raises(FPTQuantError, match=rf"^{FIRST}.gate_up_proj: experts quantize the same input differently"):
        prepare(built)
