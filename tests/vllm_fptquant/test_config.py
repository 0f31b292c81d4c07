"""Which layer gets which treatment, and what is refused before any weight is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import LoRAConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig, DownHadamard, InputHadamard, KVCacheScheme, TransformRecord
from fptquant.format.steps import Hadamard
from tests.vllm_fptquant.layers import COLUMNS, FUSED, build_attention, build_linear, quant_config
from vllm_fptquant.config import FPTQuantConfig
from vllm_fptquant.linear import FPTQuantLinearMethod

pytestmark = pytest.mark.usefixtures("parallel_world")


def test_newer_format_is_refused() -> None:
    config = {**CheckpointConfig().to_dict(), "format_version": 3}
    with pytest.raises(FPTQuantError, match="format_version 3.*upgrade vllm-fptquant"):
        FPTQuantConfig.from_config(config)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(FPTQuantError, match="wieghts"):
        FPTQuantConfig.from_config({**CheckpointConfig().to_dict(), "wieghts": {}})


def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_type="xpu")
    monkeypatch.setattr("vllm_fptquant.config.current_platform", platform)
    with pytest.raises(FPTQuantError, match="CPUs and NVIDIA GPUs, not on 'xpu'"):
        FPTQuantConfig.from_config(CheckpointConfig().to_dict())


@pytest.mark.parametrize(("capability", "served"), [(70, False), (75, True), (90, True), (120, True)])
def test_old_gpus_are_refused(capability: int, served: bool, pretend_gpu: Callable[[int], None]) -> None:
    pretend_gpu(capability)
    if served:
        FPTQuantConfig.from_config(CheckpointConfig().to_dict())
        return
    with pytest.raises(FPTQuantError, match=r"compute capability 7.5 \(Turing\) or newer.*this one has 7.0"):
        FPTQuantConfig.from_config(CheckpointConfig().to_dict())


def test_lora_is_refused(serving: Callable[..., None]) -> None:
    serving()
    get_current_vllm_config().lora_config = LoRAConfig(max_lora_rank=8)
    with pytest.raises(FPTQuantError, match="LoRA adapters don't work on fptquant checkpoints"):
        build_linear("down", quant_config())


def test_exact_mode_is_for_cpus(pretend_gpu: Callable[[int], None], serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"exact": True}})
    with pytest.raises(FPTQuantError, match="exact serves on CPUs only"):
        build_linear("down", quant_config())


def test_exact_mode_is_for_quantized_caches(serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"exact": True}})
    with pytest.raises(FPTQuantError, match="exact needs a quantized KV cache"):
        build_attention(quant_config(kv_cache=KVCacheScheme(bits=16)))


DIVISION = "eager_numerics.division_rounding"


def test_compiler_divides_exactly_on_gpus(pretend_gpu: Callable[[int], None], serving: Callable[..., None]) -> None:
    serving()
    build_linear("down", quant_config(), params_dtype=torch.bfloat16)
    assert get_current_vllm_config().compilation_config.inductor_compile_config[DIVISION] is True


def test_compiler_of_cpus_is_left_alone(serving: Callable[..., None]) -> None:
    serving()
    build_linear("down", quant_config())
    assert DIVISION not in get_current_vllm_config().compilation_config.inductor_compile_config


@pytest.mark.parametrize(("block", "capability", "fits"), [(32, 80, True), (32, 75, False), (2**16, 90, False)])
def test_fast_hadamard_within_its_limits(
    block: int,
    capability: int,
    fits: bool,
    serving: Callable[..., None],
    pretend_gpu: Callable[[int], None],
) -> None:
    pretend_gpu(capability)
    serving(additional_config={"fptquant": {"fast_hadamard": True}})
    config = quant_config(transforms=TransformRecord(down_hadamard=DownHadamard(block=block)))
    size = max(block, 96)

    def build() -> RowParallelLinear:
        return RowParallelLinear(
            size,
            64,
            bias=False,
            quant_config=config,
            prefix="model.layers.0.mlp.down_proj",
            params_dtype=torch.float16,
        )

    if fits:
        assert build().quant_method.fast_hadamard
        return
    with pytest.raises(FPTQuantError, match=f"down_proj: fast_hadamard needs .*8.0 .*{block}: leave it out"):
        build()


def test_fast_hadamard_is_for_gpus(serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"fast_hadamard": True}})
    config = quant_config(transforms=TransformRecord(down_hadamard=DownHadamard(block=32)))
    with pytest.raises(FPTQuantError, match="down_proj: fast_hadamard needs a GPU"):
        build_linear("down", config)


def test_survives_the_way_to_other_processes() -> None:
    config = quant_config(ignore=("lm_head", "re:.*o_proj"))
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.checkpoint == config.checkpoint
        assert copied.packed_modules_mapping == FUSED


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("a.qkv_proj", ("a.q_proj", "a.k_proj", "a.v_proj")),
        ("a.gate_up_proj", ("a.gate_proj", "a.up_proj")),
        ("a.down_proj", ("a.down_proj",)),
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_fused_names_are_expanded(name: str, shards: tuple[str, ...]) -> None:
    assert quant_config().shard_names(name) == shards


def test_ignored_layers_stay_in_floating_point() -> None:
    config = quant_config(ignore=("re:.*self_attn.*",))
    layer = build_linear("qkv", config)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert layer.weight.shape == (256, 64)
    assert isinstance(build_linear("down", config).quant_method, FPTQuantLinearMethod)


def test_one_ignored_shard_of_a_fused_layer_is_refused() -> None:
    config = quant_config(ignore=("model.layers.0.self_attn.k_proj",))
    with pytest.raises(FPTQuantError, match=r"qkv_proj as one product.*q_proj: w4a8.*k_proj: not quantized"):
        build_linear("qkv", config)


def test_different_schemes_in_a_fused_layer_are_refused() -> None:
    config = quant_config(overrides=({"modules": "re:.*up_proj", "activations": {"bits": 4, "symmetric": False}},))
    with pytest.raises(FPTQuantError, match=r"gate_proj: w4a8.*up_proj: w4a4 asymmetric"):
        build_linear("gate_up", config)


def test_override_of_a_whole_fused_layer() -> None:
    config = quant_config(overrides=({"modules": "re:.*(gate|up)_proj", "activations": {"bits": 4}},))
    assert build_linear("gate_up", config).quant_method.scheme.activations.bits == 4
    assert build_linear("down", config).quant_method.scheme.activations.bits == 8


def test_hadamard_is_for_down_proj_only() -> None:
    config = quant_config(transforms=TransformRecord(down_hadamard=DownHadamard(block=32)))
    assert build_linear("down", config).quant_method.arrangement.inputs == (Hadamard(32),)
    assert build_linear("o", config).quant_method.arrangement.inputs == ()
    assert build_linear("gate_up", config).quant_method.arrangement.inputs == ()


def test_hadamards_of_the_other_groups() -> None:
    config = quant_config(transforms=TransformRecord(input_hadamard=InputHadamard(qkv=64, gate_up=16)))
    inputs = {kind: build_linear(kind, config).quant_method.arrangement.inputs for kind in COLUMNS}
    assert inputs == {"qkv": (Hadamard(64),), "o": (), "gate_up": (Hadamard(16),), "down": ()}
    config = quant_config(transforms=TransformRecord(input_hadamard=InputHadamard(o=32)), ignore=("re:.*o_proj",))
    with pytest.raises(FPTQuantError, match=r"o_proj is in `ignore`, so that Hadamard\(block=32\) can't"):
        build_linear("o", config)


def test_ignored_layer_with_online_steps_is_refused() -> None:
    transforms = TransformRecord(down_hadamard=DownHadamard(block=32), residual_scale=True)
    config = quant_config(transforms=transforms, ignore=("re:.*_proj",))
    assert isinstance(build_linear("o", config).quant_method, UnquantizedLinearMethod)  # S cancels
    with pytest.raises(FPTQuantError, match=r"down_proj is in `ignore`, so that Hadamard\(block=32\) can't"):
        build_linear("down", config)


def test_embeddings_and_head_are_left_to_vllm() -> None:
    config = quant_config()
    for kind in (VocabParallelEmbedding, ParallelLMHead):
        assert config.get_quant_method(kind.__new__(kind), "lm_head") is None


def test_mapper_renames_paths_but_not_patterns() -> None:
    config = quant_config(
        ignore=("lm_head", "model.layers.0.mlp.down_proj", "re:.*model.layers.1.*"),
        overrides=({"modules": "model.layers.2.mlp.down_proj", "activations": {"bits": 4}},),
    )
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.checkpoint.ignore == (
        "lm_head",
        "language_model.model.layers.0.mlp.down_proj",
        "re:.*model.layers.1.*",
    )
    assert config.checkpoint.overrides[0].modules == "language_model.model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    ("scaled", "version", "architecture", "fix"),
    [
        (True, 1, "LlamaForCausalLM", "FPTQuantLlamaForCausalLM"),
        (False, 1, "FPTQuantLlamaForCausalLM", "'LlamaForCausalLM'"),
        (False, 2, "LlamaForCausalLM", "FPTQuantLlamaForCausalLM"),  # ours serves all of them since
    ],
)
def test_architecture_must_match(scaled: bool, version: int, architecture: str, fix: str) -> None:
    def config(scaled: bool) -> FPTQuantConfig:
        return quant_config(transforms=TransformRecord(residual_scale=scaled), format_version=version)

    hf_config = SimpleNamespace(architectures=[architecture])
    with pytest.raises(FPTQuantError, match=f"residual_scale is {str(scaled).lower()}.*{fix}"):
        config(scaled).maybe_update_config("model", hf_config)
    right = architecture if version == 1 else "FPTQuantLlamaForCausalLM"
    config(not scaled).maybe_update_config("model", SimpleNamespace(architectures=[right]))


def test_unknown_kernel_override(serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"kernel": "merlin"}})
    with pytest.raises(FPTQuantError, match="unknown kernel 'merlin': did you mean 'marlin'"):
        build_linear("down", quant_config())


def test_kernel_override_that_cannot_do_a_layer(serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"kernel": "fbgemm"}})
    with pytest.raises(FPTQuantError, match=r"'fbgemm' cannot compute model.layers.0.mlp.down_proj: .*16 bits"):
        build_linear("down", quant_config(activations={"bits": 16}))


def test_kernel_override_is_used(serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"kernel": "reference"}})
    assert build_linear("down", quant_config()).quant_method.kernel_class.name == "reference"


def test_unquantized_kv_cache_is_left_to_vllm() -> None:
    from tests.vllm_fptquant.layers import build_attention

    attention = build_attention(quant_config(kv_cache=KVCacheScheme(bits=16)))
    assert not hasattr(attention, "k_scale")


def test_attention_of_another_kind_is_refused() -> None:
    from vllm.model_executor.layers.attention import EncoderOnlyAttention

    layer: Any = EncoderOnlyAttention.__new__(EncoderOnlyAttention)
    with pytest.raises(FPTQuantError, match="static KV cache needs plain decoder attention.*EncoderOnly"):
        quant_config().get_quant_method(layer, "model.layers.0.self_attn.attn")
