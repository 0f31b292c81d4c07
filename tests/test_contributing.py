"""The worked example of CONTRIBUTING.md is real code: it preserves the function, and the check would notice if not."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fptquant.transforms import TransformOptions, TransformSet
from fptquant.wiring.lookup import architecture_of
from tests.merging import merge_transforms

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def _example() -> str:
    found = re.search(r"<!-- test: sign_flip -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    return found.group(1)


def _difference(code: str) -> float:
    namespace: dict[str, object] = {}
    exec(code, namespace)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, mlp_bias=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    architecture = architecture_of(config)
    shape = architecture.shape(config)
    transforms = TransformSet({}, shape, seed=0)
    generator = torch.Generator().manual_seed(0)
    transforms.transforms["T_f"] = namespace["SignFlip"](shape, TransformOptions(), generator)  # type: ignore[operator]
    changed = copy.deepcopy(model)
    list(merge_transforms(changed, architecture, transforms))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        return float((changed(tokens).logits - model(tokens).logits).abs().max())


def test_example_preserves_the_function() -> None:
    assert _difference(_example()) < 1e-5


def test_the_check_notices_a_half_in_the_wrong_place() -> None:
    wrong = _example().replace("place.role is Role.UP", "place.role is Role.GATE")
    assert wrong != _example()
    assert _difference(wrong) > 1e-3
