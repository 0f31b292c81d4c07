"""Choice of a kernel, and the user's override of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fptquant.checkpoint import ActivationScheme, LinearScheme, WeightScheme
from fptquant.errors import FPTQuantError
from vllm_fptquant.kernels.base import LinearSpec
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.reference import ReferenceKernel
from vllm_fptquant.kernels.select import select_kernel
from vllm_fptquant.options import ServingOptions


def spec(weights: int = 4, activations: int = 8, device: str = "cpu") -> LinearSpec:
    scheme = LinearScheme(weights=WeightScheme(bits=weights), activations=ActivationScheme(bits=activations))
    return LinearSpec(scheme, 64, 64, torch.float32, device)


def test_fastest_kernel_that_is_exact() -> None:
    assert select_kernel(spec(), None, "x")[0] is FbgemmKernel
    assert select_kernel(spec(activations=4), None, "x")[0] is FbgemmKernel
    assert select_kernel(spec(activations=16), None, "x")[0] is ReferenceKernel
    assert select_kernel(spec(weights=8), None, "x")[0] is ReferenceKernel


def test_reason_names_what_was_passed_over() -> None:
    assert "not fbgemm" in select_kernel(spec(activations=16), None, "x")[1]


def test_without_fbgemm_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_fptquant.kernels.fbgemm.ENGINE", "none")
    assert select_kernel(spec(), None, "x")[0] is ReferenceKernel


def test_override() -> None:
    assert select_kernel(spec(), "reference", "x")[0] is ReferenceKernel


def test_unknown_override_lists_the_known_and_suggests() -> None:
    with pytest.raises(FPTQuantError, match=r"unknown kernel 'fbgem': did you mean 'fbgemm'.*fbgemm, reference"):
        select_kernel(spec(), "fbgem", "x")


def test_override_that_cannot_do_it_names_those_that_can() -> None:
    with pytest.raises(FPTQuantError, match=r"'fbgemm' cannot compute layer0.*16 bits.*can: reference"):
        select_kernel(spec(activations=16), "fbgemm", "layer0")


def test_no_kernel_for_a_device() -> None:
    with pytest.raises(FPTQuantError, match=r"no kernel can compute layer0 .*fbgemm: .*cuda.*reference: .*cuda"):
        select_kernel(spec(device="cuda"), None, "layer0")


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
