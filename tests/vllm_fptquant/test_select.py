"""Choice of a kernel, and the user's override of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fptquant.errors import FPTQuantError
from fptquant.format import ActivationScheme, LinearScheme, WeightScheme
from fptquant.recipe import PRECISIONS
from vllm_fptquant.kernels.base import CpuKernel, LinearSpec
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.marlin import MarlinInt8Kernel
from vllm_fptquant.kernels.onednn import OnednnKernel
from vllm_fptquant.kernels.reference import ReferenceKernel
from vllm_fptquant.kernels.select import select_kernel
from vllm_fptquant.options import ServingOptions


def spec(weights: int = 4, activations: int = 8, device: str = "cpu") -> LinearSpec:
    scheme = LinearScheme(weights=WeightScheme(bits=weights), activations=ActivationScheme(bits=activations))
    return LinearSpec(scheme, 64, 64, torch.float32, device)


@pytest.fixture
def vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is said to have AVX512-VNNI."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("vnni", [True, False], indirect=True)
def test_fastest_kernel_that_is_exact(vnni: bool) -> None:
    narrow: type[CpuKernel] = OnednnKernel if vnni else FbgemmKernel
    assert select_kernel(spec(), None, "x")[0] is narrow
    assert select_kernel(spec(activations=4), None, "x")[0] is narrow
    assert select_kernel(spec(activations=16), None, "x")[0] is ReferenceKernel
    assert select_kernel(spec(weights=8), None, "x")[0] is (OnednnKernel if vnni else ReferenceKernel)
    for precision in GROUPED:
        scheme = LinearScheme(weights=PRECISIONS[precision].weights, activations=ActivationScheme())
        assert select_kernel(replace(spec(), scheme=scheme), None, "x")[0] is narrow


@pytest.mark.parametrize("vnni", [True], indirect=True)
@pytest.mark.parametrize(("features", "kernel"), [(2**14, OnednnKernel), (2**14 + 8, FbgemmKernel)])
def test_sums_that_float32_does_not_hold_go_elsewhere(vnni: bool, features: int, kernel: type[CpuKernel]) -> None:
    scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(symmetric=False))
    assert select_kernel(replace(spec(), scheme=scheme, in_features=features), None, "x")[0] is kernel
    assert select_kernel(replace(spec(), in_features=features), None, "x")[0] is OnednnKernel


def test_reason_names_what_was_passed_over() -> None:
    assert "not fbgemm" in select_kernel(spec(activations=16), None, "x")[1]


@pytest.mark.parametrize("vnni", [False], indirect=True)
def test_without_fbgemm_the_reference_takes_over(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_fptquant.kernels.fbgemm.ENGINE", "none")
    assert select_kernel(spec(), None, "x")[0] is ReferenceKernel


def test_override() -> None:
    assert select_kernel(spec(), "reference", "x")[0] is ReferenceKernel


def test_unknown_override_lists_the_known_and_suggests() -> None:
    with pytest.raises(FPTQuantError, match=r"unknown kernel 'fbgem': did you mean 'fbgemm'.*fbgemm.*reference"):
        select_kernel(spec(), "fbgem", "x")


def test_override_that_cannot_do_it_names_those_that_can() -> None:
    with pytest.raises(FPTQuantError, match=r"'fbgemm' cannot compute layer0.*16 bits.*can: reference"):
        select_kernel(spec(activations=16), "fbgemm", "layer0")


def test_no_kernel_for_a_device() -> None:
    with pytest.raises(FPTQuantError, match=r"no kernel can compute layer0 .*none runs on tpu"):
        select_kernel(spec(device="tpu"), None, "layer0")


def test_override_by_several_names() -> None:
    assert select_kernel(spec(activations=16), "fbgemm, reference", "x")[0] is ReferenceKernel
    with pytest.raises(FPTQuantError, match=r"unknown kernel 'nothing'"):
        select_kernel(spec(), "fbgemm,nothing", "x")
    with pytest.raises(FPTQuantError, match=r"'marlin' cannot compute x: .*; 'fbgemm' cannot.*can: reference"):
        select_kernel(spec(activations=16), "marlin,fbgemm", "x")


CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 120)
# What linear layers get, and lm_head (7-bit weights, 8-bit activations).
LAYERS = dict.fromkeys(("w4a8kv8", "w4a4kv4", "w4a4kv8", "w4a8", "w4a4kv4-symmetric"), "marlin-int8") | {
    "w4a16": "marlin"
}
GROUPED = [name for name in PRECISIONS if PRECISIONS[name].weights.strategy == "group"]


def on_gpu(scheme: LinearScheme, capability: int, dtype: torch.dtype = torch.float16, k: int = 4096) -> LinearSpec:
    return LinearSpec(scheme, k, 4096, dtype, "cuda", capability)


class TestGpus:
    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("precision", list(LAYERS))
    @pytest.mark.parametrize("humming", [False, True])
    def test_every_preset_on_every_gpu(
        self, precision: str, capability: int, humming: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Humming is for those who ask for it, whether or not it is installed."""
        monkeypatch.setattr("vllm_fptquant.kernels.humming.unavailable", lambda: None if humming else "not installed")
        chosen = PRECISIONS[precision]
        scheme = LinearScheme(weights=chosen.weights, activations=chosen.activations)
        for dtype in (torch.float16, torch.bfloat16) if capability >= 80 else (torch.float16,):
            spec = on_gpu(scheme, capability, dtype)
            assert select_kernel(spec, None, "x")[0].name == LAYERS[precision]
            assert select_kernel(replace(spec, experts=True), None, "x")[0].name == f"{LAYERS[precision]}-experts"
        int4 = humming and precision == "w4a4kv4-symmetric" and 80 <= capability < 90
        wanted = select_kernel(on_gpu(scheme, capability), "humming-int4,marlin-int8,marlin", "x")[0].name
        assert wanted == ("humming-int4" if int4 else LAYERS[precision])

    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("bits", [7, 8])
    def test_wide_weights(self, bits: int, capability: int) -> None:
        """The head and what a budget widens. Blackwell has no int8 CUTLASS."""
        scheme = LinearScheme(weights=WeightScheme(bits=bits), activations=ActivationScheme(bits=8))
        kernel, reason = select_kernel(on_gpu(scheme, capability), None, "lm_head")
        assert kernel.name == ("triton-int8" if capability >= 100 else "cutlass-int8")
        assert f"4-bit weights only, these have {bits}" in reason
        assert ("7.5 to 9.0" in reason) == (capability >= 100)

    @pytest.mark.parametrize("capability", CAPABILITIES)
    @pytest.mark.parametrize("precision", GROUPED)
    def test_multipliers(self, precision: str, capability: int) -> None:
        """Codes of 7 bits, for the kernels of 8. Experts have Marlin's alone."""
        scheme = LinearScheme(weights=PRECISIONS[precision].weights, activations=ActivationScheme(bits=8))
        kernel, reason = select_kernel(on_gpu(scheme, capability), None, "x")
        assert kernel.name == ("triton-int8" if capability >= 100 else "cutlass-int8")
        assert "not marlin-int8: multiplies int8 activations by 4-bit weights with a scale for each channel" in reason
        experts = replace(on_gpu(scheme, capability), experts=True)
        with pytest.raises(FPTQuantError, match="marlin-int8-experts: multiplies int8 .* not for groups as well"):
            select_kernel(experts, None, "x")
        alone = LinearScheme(weights=scheme.weights, activations=ActivationScheme(bits=16))
        assert select_kernel(on_gpu(alone, capability), None, "x")[0].name == "marlin"

    def test_odd_sizes(self) -> None:
        scheme = LinearScheme(weights=WeightScheme(bits=7), activations=ActivationScheme(bits=8))
        assert select_kernel(on_gpu(scheme, 86, k=100), None, "lm_head")[0].name == "triton-int8"
        with pytest.raises(
            FPTQuantError, match="cutlass-int8: needs sizes.*triton-int8: Triton needs.*humming-int8: needs input"
        ):
            select_kernel(on_gpu(scheme, 75, k=100), None, "lm_head")

    @pytest.mark.parametrize("capability", CAPABILITIES)
    def test_asymmetric_eight_bits(self, capability: int) -> None:
        """Exact in CUTLASS alone, which Blackwell lacks: refused there, not approximated."""
        scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=8, symmetric=False))
        if capability < 100:
            assert select_kernel(on_gpu(scheme, capability), None, "x")[0].name == "cutlass-int8"
            return
        with pytest.raises(FPTQuantError, match="marlin-int8: takes no zero point.*triton-int8: takes no zero point"):
            select_kernel(on_gpu(scheme, capability), None, "x")

    def test_extension_that_failed_to_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MarlinInt8Kernel, "operators", ("marlin_gemm", "no_such_operator"))
        scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme())
        reason = select_kernel(on_gpu(scheme, 80), None, "x")[1]
        assert "marlin-int8: vLLM's extension has no no_such_operator" in reason

    def test_turing_has_no_bfloat16(self) -> None:
        scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=16))
        with pytest.raises(FPTQuantError, match="marlin: needs --dtype float16 .*7.5"):
            select_kernel(on_gpu(scheme, 75, torch.bfloat16), None, "x")

    def test_float32_is_refused(self) -> None:
        scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme())
        with pytest.raises(FPTQuantError, match="computes in 16 bits, not in float32: serve with --dtype"):
            select_kernel(on_gpu(scheme, 80, torch.float32), None, "x")

    def test_kernels_of_another_device_are_no_override(self) -> None:
        scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme())
        with pytest.raises(
            FPTQuantError, match="runs on CPUs, not on 'cuda'; kernels that can: .*marlin-int8, cutlass"
        ):
            select_kernel(on_gpu(scheme, 80), "fbgemm", "x")
        assert select_kernel(on_gpu(scheme, 80), "triton-int8", "x")[0].name == "triton-int8"


@pytest.mark.parametrize("config", [None, SimpleNamespace(additional_config={}), SimpleNamespace()])
def test_options_default(config: object) -> None:
    assert ServingOptions.of(config).kernel is None


def test_options_from_additional_config() -> None:
    config = SimpleNamespace(additional_config={"fptquant": {"kernel": "reference"}, "other": 1})
    assert ServingOptions.of(config).kernel == "reference"


@pytest.mark.parametrize("given", [{"kernal": "reference"}, {"kernel": 3}, "reference"])
def test_options_refuse_what_they_do_not_know(given: object) -> None:
    with pytest.raises(FPTQuantError, match="additional-config, key 'fptquant'.*known: kernel"):
        ServingOptions.of(SimpleNamespace(additional_config={"fptquant": given}))
