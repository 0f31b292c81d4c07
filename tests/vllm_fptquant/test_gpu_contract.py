"""What our kernels pass to vLLM, against signatures and schemas recorded from its GPU wheel."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.scalar_type import scalar_types

import record_gpu_contract
from fptquant.format.steps import Hadamard
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.gpu_emulation import CONTRACT
from tests.vllm_fptquant.layers import steps_of
from tests.vllm_fptquant.test_gpu_kernels import weights_of
from vllm_fptquant.kernels import cutlass_int8, experts, gpu, marlin, marlin_cutlass, triton_int8
from vllm_fptquant.kernels.base import GpuKernel
from vllm_fptquant.kernels.gpu import GpuLinear

# Where our code finds a function, and where the wheel has it.
CALLS: dict[tuple[Any, str], str] = {
    (cutlass_int8.ops, "cutlass_scaled_mm"): "vllm/_custom_ops.py:cutlass_scaled_mm",
    (cutlass_int8.ops, "cutlass_scaled_mm_azp"): "vllm/_custom_ops.py:cutlass_scaled_mm_azp",
    (marlin.ops, "gptq_marlin_repack"): "vllm/_custom_ops.py:gptq_marlin_repack",
    (gpu.ops, "hadacore_transform"): "vllm/_custom_ops.py:hadacore_transform",
    (experts.ops, "moe_align_block_size"): "vllm/_custom_ops.py:moe_align_block_size",
    (experts.ops, "moe_wna16_marlin_gemm"): "vllm/_custom_ops.py:moe_wna16_marlin_gemm",
    (experts.marlin_utils, "get_marlin_workspace"): f"{record_gpu_contract.MARLIN_UTILS}:get_marlin_workspace",
    (marlin, "marlin_padded_nk"): f"{record_gpu_contract.MARLIN_UTILS}:marlin_padded_nk",
    (marlin, "marlin_permute_scales"): f"{record_gpu_contract.MARLIN_UTILS}:marlin_permute_scales",
    (torch.ops.vllm, "marlin_gemm"): f"{record_gpu_contract.MARLIN_UTILS}:_marlin_gemm",
    (triton_int8, "triton_scaled_mm"): f"{record_gpu_contract.TRITON}:triton_scaled_mm",
}


def signature_of(parameters: str) -> inspect.Signature:
    """A recorded `a, b=1, *, c` as a signature; the text is checked to be nothing but parameters."""
    tree = ast.parse(f"lambda {parameters}: None", mode="eval")
    assert isinstance(tree.body, ast.Lambda)
    return inspect.signature(eval(compile(tree, "<contract>", "eval")))


def run_everything() -> None:
    """Every call that our kernels make."""
    x = torch.randn(3, 64)
    codes = torch.randint(-8, 8, (64, 64))
    kernels: list[tuple[type[GpuKernel], int, int | None]] = [
        (marlin.MarlinInt8Kernel, 8, None),
        (marlin.MarlinKernel, 16, None),
        (marlin_cutlass.MarlinCutlassKernel, 8, None),
        (experts.MarlinInt8Experts, 8, None),
        (experts.MarlinExperts, 16, None),
        (cutlass_int8.CutlassInt8Kernel, 8, None),
        (cutlass_int8.CutlassInt8Kernel, 8, 3),
    ]
    for kernel, bits, zero_point in kernels:
        weights = weights_of(bits, codes, zero_point)
        steps = steps_of(weights, Hadamard(32))
        for widen_from in (None, 1):
            built = kernel(weights, torch.float16)
            built.widen_from = widen_from
            GpuLinear(built, weights, steps, fast_hadamard=True)(x.half(), None)
    arguments = x.to(torch.int8), codes.to(torch.int8), torch.ones(3), torch.ones(64), torch.float16
    triton_int8._multiply(*arguments)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, operators: None) -> Callable[[dict[str, str]], set[str]]:
    """Function that runs everything with each call bound to these signatures, and returns which were called."""

    def run(signatures: dict[str, str]) -> set[str]:
        called = set()

        def watch(real: Callable[..., Any], name: str) -> Callable[..., Any]:
            signature = signature_of(signatures[name])

            def call(*args: Any, **kwargs: Any) -> Any:
                called.add(name)
                signature.bind(*args, **kwargs)
                return real(*args, **kwargs)

            return call

        def triton(input: Any, weight: Any, scale_a: Any, scale_b: Any, out_dtype: Any) -> Any:
            return gpu_emulation.triton_int8(input, weight.t(), scale_a, scale_b, out_dtype)

        with monkeypatch.context() as patch:
            for (module, attribute), name in CALLS.items():
                real = triton if attribute == "triton_scaled_mm" else getattr(module, attribute)
                patch.setattr(module, attribute, watch(real, name))
            run_everything()
        return called

    return run


def test_our_calls_fit_the_wheel(bound: Callable[[dict[str, str]], set[str]]) -> None:
    assert bound(CONTRACT["signatures"]) == set(CONTRACT["signatures"])


@pytest.mark.parametrize("name", list(CONTRACT["signatures"]))
def test_a_renamed_argument_is_noticed(name: str, bound: Callable[[dict[str, str]], set[str]]) -> None:
    signature = signature_of(CONTRACT["signatures"][name])
    required = [p.name for p in signature.parameters.values() if p.default is inspect.Parameter.empty]
    for argument in required:
        renamed = CONTRACT["signatures"][name].replace(argument, f"renamed_{argument}", 1)
        with pytest.raises(TypeError):
            bound({**CONTRACT["signatures"], name: renamed})


@pytest.mark.parametrize("name", list(CONTRACT["operators"]))
def test_emulated_operators_have_the_wheels_arguments(name: str) -> None:
    """In this order: an operator's arguments are given by position, so a reordered one must fail here."""
    schema = torch._C.parse_schema(CONTRACT["operators"][name])
    implementation, _ = gpu_emulation.OPERATORS[name]
    assert list(inspect.signature(implementation).parameters) == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("section", ["marlin_channelwise", "marlin_experts_channelwise"])
def test_the_wheel_has_the_marlin_kernels_that_we_select(section: str) -> None:
    """Turing's have a pipeline of two stages; int8 activations go with 4-bit weights alone."""
    compiled = [tuple(kernel) for kernel in CONTRACT[section]]
    int8, u4, u8 = scalar_types.int8.id, scalar_types.uint4b8.id, scalar_types.uint8b128.id
    half, bfloat16 = scalar_types.float16.id, scalar_types.bfloat16.id
    for output in (half, bfloat16):
        assert (int8, u4, output, 4) in compiled
        assert (output, u4, output, 4) in compiled and (output, u8, output, 4) in compiled
        assert (int8, u8, output, 4) not in compiled
    assert (int8, u4, half, 2) in compiled and (half, u4, half, 2) in compiled and (half, u8, half, 2) in compiled
    assert (int8, u4, bfloat16, 2) not in compiled and (bfloat16, u4, bfloat16, 2) not in compiled


def test_record_is_what_the_wheel_says() -> None:
    wheel = record_gpu_contract.find_wheel(record_gpu_contract.VERSION)
    if wheel is None:
        pytest.skip("the GPU wheel is not here: scripts/record_gpu_contract.py downloads it")
    assert record_gpu_contract.derive(wheel) == CONTRACT


def test_a_changed_wheel_is_noticed() -> None:
    other = {**CONTRACT, "operators": {**CONTRACT["operators"], "marlin_gemm": "marlin_gemm(Tensor a) -> Tensor"}}
    assert not record_gpu_contract.differences(CONTRACT, CONTRACT)
    assert len(record_gpu_contract.differences(CONTRACT, other)) == 1
    for section in ("marlin_channelwise", "marlin_experts_channelwise"):
        assert "Marlin kernel" in record_gpu_contract.differences(CONTRACT, {**CONTRACT, section: []})[0]
