"""Perplexity windows and arithmetic, and the checks behind `fptquant verify`."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fptquant.errors import FPTQuantError
from fptquant.evaluation.comparison import compare
from fptquant.evaluation.dynamic import use_dynamic_ranges
from fptquant.evaluation.equivalence import _largest_difference, check_served
from fptquant.evaluation.perplexity import evaluation_windows, measure, transformers_scorer
from fptquant.format import LinearScheme
from fptquant.format.steps import linear_steps
from fptquant.quantize import RangeOptions, search_range
from fptquant.simulate import SimulatedLinear
from fptquant.train.teacher import Teacher
from fptquant.wiring.llama import LLAMA
from tests.conftest import TEXT, VOCABULARY, build_model


def test_windows_start_at_the_beginning_and_do_not_overlap(
    tokenizer_with_bos: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = tmp_path / "t.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    tokens = tokenizer_with_bos(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = evaluation_windows(tokenizer_with_bos, text, 5, 20)
    assert windows.flatten().tolist() == tokens[:100]
    with_bos = evaluation_windows(tokenizer_with_bos, text, 5, 20, special_tokens=True)
    assert with_bos.shape == (5, 20) and bool((with_bos[:, 0] == 0).all())
    assert with_bos[:, 1:].flatten().tolist() == tokens[:95]
    count = len(tokens)
    with pytest.raises(FPTQuantError, match=f"has {count} tokens, but 1 windows of {count + 1} need {count + 1}"):
        evaluation_windows(tokenizer_with_bos, text, 1, count + 1)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_text(content: bytes | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(FPTQuantError, match="t.txt' (can't be read|is UTF-16)"):
        evaluation_windows(tokenizer, tmp_path / "t.txt", 1, 8)


def test_perplexity_equals_the_loss_of_transformers(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model("gqa")
    windows = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    result = measure(map(transformers_scorer(model), windows), 16)
    expected = math.exp(model(windows, labels=windows).loss.item())
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.windows, result.length, result.predicted_tokens) == (3, 16, 45)


def test_perplexity_of_a_known_distribution() -> None:
    """Means over tokens, not over windows: windows of different length weigh differently."""
    scores = [torch.log(torch.tensor([0.5, 0.5, 0.5])), torch.log(torch.tensor([0.125]))]
    result = measure(scores, 4)
    assert result.perplexity == pytest.approx(2.0 ** ((3 * 1 + 3) / 4))


def test_largest_difference_does_not_lose_nan() -> None:
    zeros, damaged = torch.zeros(2), torch.tensor([0.0, torch.nan])
    assert _largest_difference([zeros, zeros + 2], [zeros, zeros]) == 2.0
    assert math.isnan(_largest_difference([zeros, damaged], [zeros, zeros]))


@pytest.mark.parametrize(
    "offset, passed", [(0.0, True), (5e-4, True), (2e-3, False), (-2e-3, False), (math.nan, False)]
)
def test_served_check_limits_the_perplexity(offset: float, passed: bool) -> None:
    windows = torch.zeros(2, 5)
    check = check_served(lambda w: torch.full((4,), -1.0), lambda w: torch.full((4,), -1.0 - offset), windows)
    assert check.passed is passed


def test_dynamic_ranges_follow_each_token() -> None:
    """Bits that a static range wastes on one large token are not wasted: each token's error is relative to itself."""
    model = build_model("gqa")
    linear = SimulatedLinear.from_linear(
        model.lm_head, linear_steps(LinearScheme(weights={"bits": 8}, activations={"bits": 8}))
    )
    x = torch.randn(1, 6, 32) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0])[:, None]
    expected = linear(x)
    linear.set_input_quantizer(*search_range(x, 8, True, RangeOptions(method="minmax")))
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    linear.set_weight_codes(torch.round(linear.weight / scale), scale)
    static = (linear(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    model.lm_head = linear
    use_dynamic_ranges(model)
    dynamic = (linear(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert static[0, 0] == 1 and bool((dynamic < 0.02).all())


def test_comparison_with_the_original(tmp_path: Path) -> None:
    model, other = build_model("gqa"), build_model("gqa", seed=1)
    windows = torch.arange(2, 42).view(2, 20)
    teacher = Teacher(model, LLAMA, windows, tmp_path / "teacher")
    same = compare(model, teacher, range(2))
    assert abs(same.kl) < 1e-6 and same.agreement == 1
    assert same.perplexity == pytest.approx(measure(map(transformers_scorer(model), windows), 20).perplexity)
    found = compare(other, teacher, range(2))
    p, q = (m(windows).logits[:, :-1].log_softmax(-1) for m in (model, other))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found.perplexity == pytest.approx(measure(map(transformers_scorer(other), windows), 20).perplexity)
    teacher.release()
    assert compare(model, teacher, range(2)) == same  # from the cache
