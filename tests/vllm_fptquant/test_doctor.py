"""`fptquant doctor`: runs every kernel of the machine, and notices one that computes something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fptquant import cli
from fptquant.errors import FPTQuantError
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.gpu_emulation import pretended_platform
from vllm_fptquant import doctor
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.marlin import MarlinInt8Kernel

pytestmark = pytest.mark.vllm


def run() -> Any:
    return CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["doctor"])


def test_this_machine_is_well() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    results = list(doctor.check_kernels())
    assert {r.layer for r in results if r.chosen and r.status == "pass"} == set(doctor.SCHEMES)
    assert {(r.kernel, r.detail) for r in results if r.layer == "w4a8"} >= {("fbgemm", "identical")}
    for word in (f"torch {torch.__version__}", "vllm-fptquant ", "device: cpu", "fbgemm", "identical", "serves"):
        assert word in result.output
    assert "fail" not in result.output


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda self, codes: self.correct(codes) * 1.0001, "off by up to"),
        (lambda self, codes: self.missing, "AttributeError: "),
    ],
)
def test_wrong_kernel_is_found(wrong: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FbgemmKernel, "correct", FbgemmKernel.matmul, raising=False)
    monkeypatch.setattr(FbgemmKernel, "matmul", wrong)
    result = run()
    assert result.exit_code == 1 and message in result.output
    failed = {(r.kernel, r.layer) for r in doctor.check_kernels() if r.status == "fail"}
    assert failed == {("fbgemm", layer) for layer in doctor.SCHEMES if layer != "w4a16"}


@pytest.fixture
def emulated(operators: None, pretend_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU kernels on the CPU, with their operators emulated."""
    ((_, platform), *_) = pretended_platform(80)
    monkeypatch.setattr(doctor, "current_platform", platform)
    monkeypatch.setattr(doctor, "torch_device", lambda: "cpu")


@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (8, 2)])
def test_gpu_kernels_pass_when_they_compute_what_they_should(blocks: int, warps: int, emulated: None) -> None:
    gpu_emulation.split.update(blocks=blocks, warps=warps)  # as Marlin does with few columns on many processors
    results = list(doctor.check_kernels())
    passed = {r.kernel for r in results if r.status == "pass"}
    assert passed >= {"marlin-int8", "marlin", "cutlass-int8", "triton-int8", "humming-int4", "humming-int8"}
    assert passed >= {"marlin-cutlass-int8", "marlin-int8-experts", "marlin-experts"}
    assert not [r for r in results if r.status == "fail"]
    assert {r.layer for r in results if r.chosen and r.status == "pass"} == {
        f"{name}, {dtype}" for name in (*doctor.SCHEMES, "T_d") for dtype in ("float16", "bfloat16")
    }


def test_wrong_gpu_kernel_is_found(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row scale that S_n was left out of."""
    correct = MarlinInt8Kernel.forward

    def wrong(self: Any, codes: Tensor, row_scale: Tensor) -> Tensor:
        return correct(self, codes, row_scale[:1].expand(row_scale.shape).contiguous())

    monkeypatch.setattr(MarlinInt8Kernel, "forward", wrong)
    monkeypatch.setattr(doctor, "SCHEMES", {"w4a8": doctor.SCHEMES["w4a8"]})
    failed = [r for r in doctor.check_kernels() if r.status == "fail"]
    assert {r.kernel for r in failed} == {"marlin-int8"} and "units in the last place" in failed[0].detail


def test_wrong_hadamard_is_found(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose sums are rounded to 16 bits."""
    multiply = torch.ops.fptquant.mm_float32
    monkeypatch.setattr(
        torch.ops.fptquant, "mm_float32", lambda x, matrix: multiply(x, matrix).to(x.dtype).float(), raising=False
    )
    monkeypatch.setattr(doctor, "SCHEMES", {})
    failed = [r for r in doctor.check_kernels() if r.status == "fail"]
    assert {r.layer for r in failed} == {"T_d, float16", "T_d, bfloat16"}


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptquant.evaluation.vllm_backend.find_spec", lambda name: None)
    assert isinstance(run().exception, FPTQuantError)
