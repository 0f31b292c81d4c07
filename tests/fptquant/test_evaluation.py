"""Perplexity windows and arithmetic, and the checks behind `fptquant verify`."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fptquant.errors import FPTQuantError
from fptquant.evaluation.equivalence import _largest_difference, check_served
from fptquant.evaluation.perplexity import evaluation_windows, measure, transformers_scorer
from tests.conftest import TEXT, VOCABULARY


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
    with pytest.raises(FPTQuantError, match="t.txt' can't be read"):
        evaluation_windows(tokenizer, tmp_path / "t.txt", 1, 8)


def test_perplexity_equals_the_loss_of_transformers(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model("gqa")
    windows = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    result = measure(transformers_scorer(model), windows, 16)
    expected = math.exp(model(windows, labels=windows).loss.item())
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.windows, result.length, result.predicted_tokens) == (3, 16, 45)


def test_perplexity_of_a_known_distribution() -> None:
    """Means over tokens, not over windows: windows of different length weigh differently."""
    scores = [torch.log(torch.tensor([0.5, 0.5, 0.5])), torch.log(torch.tensor([0.125]))]
    iterator = iter(scores)
    result = measure(lambda window: next(iterator), [torch.zeros(4), torch.zeros(2)], 4)
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
