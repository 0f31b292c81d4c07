"""What the plugin passes to Humming, against the signatures recorded from the package that vLLM requires."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.vllm_fptquant.gpu_emulation import CONTRACT
from tests.vllm_fptquant.humming_model import HummingModel
from tests.vllm_fptquant.test_gpu_contract import signature_of
from tests.vllm_fptquant.test_humming import random_weights
from vllm_fptquant.kernels import humming as module
from vllm_fptquant.kernels.humming import HummingInt4Kernel, layer_config

pytestmark = pytest.mark.usefixtures("operators")


class Bound:
    """`vllm.utils.humming` with the recorded signatures: a call that does not fit them fails; then the model runs."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        assert self.record["exports"][name].rpartition(":")[2] == name
        (parameters,) = (text for place, text in self.record["signatures"].items() if place.rpartition(":")[2] == name)
        signature = signature_of(parameters)

        def call(*arguments: Any, **named: Any) -> Any:
            signature.bind(*arguments, **named)
            self.called.add(name)
            return getattr(HummingModel, name)(*arguments, **named)

        return call


def run_bound(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]) -> set[str]:
    facade = Bound(record)
    monkeypatch.setattr(module, "humming", facade)
    layer_config.cache_clear()
    kernel = HummingInt4Kernel(random_weights(4, 24, 64), torch.float16)
    real = layer_config(kernel.config)
    assert vars(real)  # read back through the recorded constructor
    kernel(torch.zeros(1, 64, dtype=torch.int8), torch.ones(1))
    return facade.called


def test_calls_fit_the_recorded_package(monkeypatch: pytest.MonkeyPatch) -> None:
    record = copy.deepcopy(CONTRACT["humming"])
    constructor = record["signatures"].pop("humming/config/config.py:LayerConfig")
    assert {"shape_n", "a_dtype", "input_quant_mode"} <= set(signature_of(constructor).parameters)
    record["signatures"]["model:LayerConfig"] = "*, n, k, weight_bits, activation_bits"
    assert run_bound(monkeypatch, record) == set(record["exports"])


@pytest.mark.parametrize(
    ("place", "old", "new"),
    [
        ("forward.py:humming_forward", "input_scale=", "scale_of_input="),
        ("forward.py:humming_forward", "compute_config=", "config_of_compute="),
        ("forward.py:humming_forward", "config, inputs", "inputs, config"),
        ("transform.py:prepare_and_transform_humming_tensors", "pad_k_to_multiple", "pad_k"),
        ("transform.py:prepare_and_transform_humming_tensors", "tensors, shape_n", "shape_n, tensors"),
        ("schema/humming.py:HummingWeightSchema", "weight_scale_type", "scale_type"),
        ("schema/humming.py:HummingInputSchema", "input_quant_mode", "quant_mode"),
    ],
)
def test_a_renamed_or_reordered_parameter_is_noticed(
    monkeypatch: pytest.MonkeyPatch, place: str, old: str, new: str
) -> None:
    record = copy.deepcopy(CONTRACT["humming"])
    del record["signatures"]["humming/config/config.py:LayerConfig"]
    record["signatures"]["model:LayerConfig"] = "*, n, k, weight_bits, activation_bits"
    text = record["signatures"][f"humming/{place}"]
    assert old in text
    record["signatures"][f"humming/{place}"] = text.replace(old, new)
    with pytest.raises(TypeError):
        run_bound(monkeypatch, record)
