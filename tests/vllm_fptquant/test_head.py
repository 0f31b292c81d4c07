"""The quantized lm_head on vLLM's real layer, whose vocabulary is padded and sharded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from fptquant.errors import FPTQuantError
from fptquant.format import (
    ActivationScheme,
    Override,
    WeightScheme,
    code_bounds,
    pack_codes,
    quantize,
    quantized_linear,
)
from tests.vllm_fptquant.layers import quant_config

VOCABULARY, HIDDEN = 150, 48  # vLLM pads the vocabulary to 192
SCALE = torch.tensor(0.02)


@pytest.fixture
def head(request: pytest.FixtureRequest, parallel_world: Callable[[int, int], None]) -> ParallelLMHead:
    """Rank and size of the tensor-parallel world come from the parameter."""
    parallel_world(*getattr(request, "param", (0, 1)))
    return build(torch.float32)


def build(dtype: torch.dtype) -> ParallelLMHead:
    override = Override(modules="lm_head", weights=WeightScheme(bits=7), activations=ActivationScheme(bits=8))
    config = quant_config(overrides=(override,), ignore=())
    return ParallelLMHead(VOCABULARY, HIDDEN, quant_config=config, prefix="lm_head", params_dtype=dtype)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-64, 64, (VOCABULARY, HIDDEN), generator=generator)
    return {
        "codes": codes,
        "weight_packed": pack_codes(codes, 7),
        "weight_scale": torch.rand(VOCABULARY, 1, generator=generator) + 0.1,
        "weight_shape": torch.tensor(codes.shape),
        "input_scale": SCALE,
    }


def load(head: ParallelLMHead, *, skip: str = "") -> ParallelLMHead:
    for name, tensor in tensors().items():
        if name not in ("codes", skip):
            parameter = getattr(head, name)
            parameter.weight_loader(parameter, tensor)
    head.quant_method.process_weights_after_loading(head)
    return head


def contract(x: Tensor) -> Tensor:
    """Logits of the whole vocabulary, as the format defines them."""
    given = tensors()
    codes = quantize(x, SCALE, *code_bounds(torch.tensor(0), 8))
    return quantized_linear(codes, given["codes"].float(), SCALE * given["weight_scale"].flatten())


@pytest.mark.parametrize("head", [(0, 1), (0, 2), (1, 2)], indirect=True)
def test_logits_equal_the_contract(head: ParallelLMHead) -> None:
    x = torch.randn(5, HIDDEN)
    logits = load(head).quant_method.apply(head, x)
    expected = contract(x)
    rows = head.shard_indices
    real = rows.org_vocab_end_index - rows.org_vocab_start_index
    assert real > 0
    assert torch.equal(logits[:, :real], expected[:, rows.org_vocab_start_index : rows.org_vocab_end_index])
    assert not logits[:, real:].any()  # padding


@pytest.mark.parametrize("head", [(7, 8)], indirect=True)
def test_rank_with_padding_only(head: ParallelLMHead) -> None:
    """The last 24 of 192 rows."""
    assert head.num_org_embeddings_per_partition == 0
    logits = load(head).quant_method.apply(head, torch.randn(5, HIDDEN))
    assert logits.shape == (5, 24) and not logits.any()


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "input_scale"])
def test_missing_tensor_is_named(name: str, head: ParallelLMHead) -> None:
    with pytest.raises(FPTQuantError, match=f"lm_head.*{name}"):
        load(head, skip=name)


@pytest.mark.parametrize(("capability", "name"), [(80, "cutlass-int8"), (100, "triton-int8")])
@pytest.mark.usefixtures("operators")
def test_gpu(
    capability: int,
    name: str,
    pretend_gpu: Callable[[int], None],
    parallel_world: Callable[[int, int], None],
) -> None:
    """The head of a pretended GPU, with emulated kernels: within the rounding to 16 bits."""
    pretend_gpu(capability)
    parallel_world(1, 2)
    head = build(torch.bfloat16)
    assert head.quant_method.kernel_class.name == name
    x = torch.randn(5, HIDDEN).bfloat16()
    logits = load(head).quant_method.apply(head, x)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    rows = head.shard_indices
    real = rows.org_vocab_end_index - rows.org_vocab_start_index
    exact = contract(x)[:, rows.org_vocab_start_index : rows.org_vocab_end_index]
    torch.testing.assert_close(logits[:, :real].float(), exact, rtol=2**-8, atol=0)
    assert not logits[:, real:].any()
