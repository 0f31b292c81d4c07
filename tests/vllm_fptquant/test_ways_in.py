"""Ways in which vLLM fills parameters: from a checkpoint, again, with dummies, without a head; right or refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from tests.conftest import bound
from tests.families import make_job
from tests.vllm_fptquant.layers import build_linear, expected, quant_config, random_tensors
from tests.vllm_fptquant.loaders import attend
from tests.vllm_fptquant.serving import TRANSFORMS, altered, quantized
from tests.vllm_fptquant.tiny_llama import TinyLlama
from vllm_fptquant.loading import PREPARED_FORMATS, require_supported_loading

TOKENS = torch.tensor([0, 5, 7, 0, 9])  # three sequences; the first starts with the sink's token
POSITIONS = torch.tensor([0, 1, 0, 1, 40])
STOCK = {  # what vLLM's own class serves, with biases
    "activations": {"bits": 4, "symmetric": False},
    "kv_cache": {"bits": 4, "strategy": "head"},
    "transforms": {"down_hadamard": {"block": 32}},
}

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class Engine:
    """A model as vLLM's worker has it, but for the KV cache: attention sees its own token only."""

    def __init__(self, checkpoint: Path, prefix: str = "", **arguments: Any) -> None:
        self.vllm_config: VllmConfig = EngineArgs(
            str(checkpoint), dtype="float32", enforce_eager=True, **arguments
        ).create_engine_config()
        with set_current_vllm_config(self.vllm_config):
            self.model = get_model(vllm_config=self.vllm_config, prefix=prefix)

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reset_lora_state(self) -> None:
        """Of the worker, after a reload; so are the next two."""

    reset_encoder_cache = reset_mm_cache = reset_lora_state
    lora_config = None

    @property
    def model_config(self) -> Any:
        return self.vllm_config.model_config

    @property
    def load_config(self) -> Any:
        return self.vllm_config.load_config

    def reload(self, **arguments: Any) -> None:
        """The worker's `reload_weights`."""
        with set_current_vllm_config(self.vllm_config):
            GPUModelRunner.reload_weights(self, **arguments)  # type: ignore[arg-type]

    def update(self, tensors: dict[str, Tensor]) -> None:
        """As engines for weight transfer do: one tensor at a time."""
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)
            for item in tensors.items():
                self.model.load_weights([item])
            finalize_layerwise_reload(self.model, self.model_config)

    def __call__(self, forward: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits, or hidden states where there is no head."""
        config = self.vllm_config
        with set_current_vllm_config(config), set_forward_context(None, config), torch.inference_mode():
            hidden: Tensor = (forward or self.model)(TOKENS, POSITIONS, None)
            if self.model_config.runner_type == "pooling":
                return hidden
            logits: Tensor = self.model.compute_logits(hidden)
            return logits


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, without an accelerator to free memory of."""

    monkeypatch.setattr(Attention, "forward", attend)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    _ROPE_DICT.clear()  # shared by models of a process; a reload that failed leaves it without values
    gc.collect()
    gc.freeze()  # what the first tests imported
    gc.disable()  # see test_model_in_process.py
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/world", 0, "gloo")
        parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    gc.enable()
    gc.collect()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one configuration, which the plugin's class serves: S_n, T_d, a sink, a quantized head."""
    groups = {"modules": "re:.*(gate|up|down)_proj", "weights": {"strategy": "group", "group_size": 32}}
    first = quantized(tmp_path_factory.mktemp("own"), transforms=[*TRANSFORMS, "S_n"], overrides=[groups])
    return first, altered(first)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with experts, routers and a shared expert in the second of three layers, and S_n and T_d."""
    path = tmp_path_factory.mktemp("mixture")
    fields = {"precision": "w4a4kv4", "rounding": {"method": "nearest"}, "transforms": [*TRANSFORMS, "S_n"]}
    pipeline.quantize(make_job("qwen2_moe with windows", path, **fields), path / "out")
    return path / "out", altered(path / "out")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same for vLLM's own class."""
    path, config = tmp_path_factory.mktemp("stock"), CheckpointConfig.model_validate(STOCK)
    first, second = (TinyLlama.random(config, bias=True, seed=seed).write(path / str(seed)) for seed in range(2))
    return first, second


@pytest.fixture(params=["own", "stock", "mixture"])
def pair(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    checkpoints: tuple[Path, Path] = request.getfixturevalue(request.param)
    return checkpoints


@pytest.fixture(params=["own", "stock"])
def dense(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """For what has nothing to do with experts."""
    checkpoints: tuple[Path, Path] = request.getfixturevalue(request.param)
    return checkpoints


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def compiled(engine: Engine) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    run: Callable[..., Tensor] = torch.compile(
        engine.model.model.forward, fullgraph=True, dynamic=True, backend="eager"
    )
    return run


def test_another_checkpoint_in_its_place(pair: tuple[Path, Path]) -> None:
    """However it comes, eager and in a graph that was compiled before; and back."""
    first, second = pair
    engine, before, after = Engine(first), Engine(first)(), Engine(second)()
    graph = compiled(engine)
    assert torch.equal(engine(graph), before) and not torch.allclose(before, after, rtol=1e-2)
    for way in (
        lambda path: engine.reload(weights_path=str(path)),
        lambda path: engine.reload(weights_iterator=iter(tensors_of(path).items())),
        lambda path: engine.update(tensors_of(path)),
    ):
        for path, expected_logits in ((second, after), (first, before)):
            way(path)
            assert torch.equal(engine(), expected_logits)
            assert torch.equal(engine(graph), expected_logits)


def test_part_of_a_checkpoint(own: tuple[Path, Path]) -> None:
    """Whole layers may be sent alone; a layer without all of its tensors is refused."""
    engine = Engine(own[0])
    tensors = tensors_of(own[0])
    engine.update({"model.embed_tokens.weight": 2 * tensors["model.embed_tokens.weight"]})
    assert not torch.equal(engine(), Engine(own[0])())
    engine.update(tensors)
    assert torch.equal(engine(), Engine(own[0])())
    with pytest.raises(FPTQuantError, match="down_proj: the checkpoint has no weight_scale"):
        engine.update({name: tensor for name, tensor in tensors.items() if not name.endswith("down_proj.weight_scale")})
    engine = Engine(own[0])
    engine.update({"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(FPTQuantError, match=r"no model.norm.sink_output, though other tensors of model.norm"):
        engine()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("model.layers.1.mlp.down_proj.weight_scale", float("nan"), "down_proj.weight_scale is nan at index 0"),
        ("model.layers.1.self_attn.k_scale", -1.0, "k_scale is -1, must be positive"),
        ("lm_head.input_scale", 0.0, "lm_head.input_scale is 0, must be positive"),
    ],
)
def test_a_reload_that_failed(name: str, value: float, match: str, own: tuple[Path, Path]) -> None:
    """Half of the model is new: it neither answers nor mixes the next weights with what was left over."""
    engine, tensors = Engine(own[0]), tensors_of(own[1])
    tensors = bound({**tensors, name: torch.full_like(tensors[name], value)}, own[1])
    with pytest.raises(FPTQuantError, match=match):
        engine.reload(weights_iterator=iter(tensors.items()))
    with pytest.raises(FPTQuantError, match="failed or isn't over: start vLLM again"):
        engine()
    with pytest.raises(FPTQuantError, match="failed before.*: start vLLM again"):
        engine.reload(weights_path=str(own[1]))


def test_weights_of_another_configuration(own: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(own[1], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["transforms"]["down_hadamard"] = {"block": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FPTQuantError, match="quantization_config.transforms is .*'block': 4.*: start vLLM again"):
        Engine(own[0]).reload(weights_path=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("way", "match"),
    [
        (lambda engine, tensors: engine.model.load_weights(tensors.items()), "load other weights with vLLM's reload"),
        (
            lambda engine, tensors: engine.reload(
                weights_iterator=iter({"model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}.items()),
                is_checkpoint_format=False,
            ),
            "weight_scale of model.layers.0.mlp.down_proj is in the kernel's layout",
        ),
        (lambda engine, tensors: engine.model.state_dict(), "can't be saved or compared"),
    ],
    ids=["load_weights", "kernel format", "state_dict"],
)
def test_prepared_weights_are_refused(way: Callable[..., Any], match: str, dense: tuple[Path, Path]) -> None:
    """In one line, and the model goes on as it was."""
    engine = Engine(dense[0])
    before = engine()
    with pytest.raises(FPTQuantError, match=match):
        way(engine, tensors_of(dense[1]))
    if "vLLM's reload" not in match:
        assert torch.equal(engine(), before)


def test_dummy_weights(pair: tuple[Path, Path]) -> None:
    """`--load-format dummy`: of plausible size, and real ones may follow."""
    engine = Engine(pair[0], load_format="dummy")
    assert bool(engine().isfinite().all())
    if pair[0].name == "out":
        assert 0.1 < engine().std() < 10
    engine.update(tensors_of(pair[1]))
    assert torch.equal(engine(), Engine(pair[1])())


@pytest.mark.parametrize("load_format", PREPARED_FORMATS)
def test_formats_of_prepared_weights(load_format: str, own: tuple[Path, Path]) -> None:
    """Those whose packages are installed get as far as the model."""
    config = EngineArgs(str(own[0]), dtype="float32", load_format=load_format).create_engine_config()
    with pytest.raises(FPTQuantError, match=f"--load-format {load_format} exchanges weights in a kernel's layout"):
        require_supported_loading(config)


def test_embeddings(dense: tuple[Path, Path]) -> None:
    """The hidden states that the head would get; and again after a reload."""
    engine = Engine(dense[0], runner="pooling", convert="embed")
    for path, way in ((dense[0], None), (dense[1], engine.reload)):
        if way is not None:
            way(weights_path=str(path))
        generating = Engine(path)
        generating.model.compute_logits = lambda hidden: hidden
        assert torch.equal(engine(), generating())


def test_as_a_draft_model(pair: tuple[Path, Path]) -> None:
    """VLLM puts a prefix before all names, which the checkpoint's exceptions (the head's bits) don't have."""
    assert torch.equal(Engine(pair[0], prefix="draft_model")(), Engine(pair[0])())


def test_a_language_model_does_not_classify(dense: tuple[Path, Path]) -> None:
    with pytest.raises(FPTQuantError, match=r"has no score.weight to classify with: serve it with --convert embed"):
        Engine(dense[0], runner="pooling", convert="classify")


@pytest.mark.parametrize("head_bits", [7, 16])
def test_classifying_by_tokens(head_bits: int, tmp_path: Path) -> None:
    """By rows of the head: those of a quantized one are no numbers to vLLM."""
    checkpoint = quantized(tmp_path, transforms=["T_k"], head_bits=head_bits)
    overrides = {"classifier_from_token": ["a", "b"], "method": "no_post_processing"}
    arguments = {"runner": "pooling", "convert": "classify", "hf_overrides": overrides}
    if head_bits < 16:
        with pytest.raises(FPTQuantError, match="classifier_from_token takes rows of lm_head"):
            Engine(checkpoint, **arguments)
        return
    engine = Engine(checkpoint, **arguments)
    from transformers import AutoTokenizer

    rows = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(["a", "b"])
    weight = tensors_of(checkpoint)["lm_head.weight"][rows]
    hidden = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(engine.model.score(hidden), hidden @ weight.T)


def test_models_are_freed(pair: tuple[Path, Path]) -> None:
    """VLLM keeps what a reload needs by layer, and forgets it when the layer goes."""
    engine = Engine(pair[0])
    layers = [weakref.ref(module) for module in engine.model.model.layers[1].mlp.modules()]
    engine.vllm_config.compilation_config.static_forward_context.clear()
    del engine
    gc.collect()
    assert not any(layer() for layer in layers)


@pytest.mark.parametrize("ignore", [["re:.*experts.*"], ["model.layers.0.mlp.experts"], None])
def test_experts_that_are_ignored(ignore: list[str] | None) -> None:
    """VLLM's own, in floating point; others are refused."""

    def build() -> Any:
        config = quant_config(**({} if ignore is None else {"ignore": ignore}))
        with set_current_vllm_config(VllmConfig()):
            return FusedMoEFactory(
                num_experts=2,
                top_k=1,
                hidden_size=32,
                intermediate_size=32,
                params_dtype=torch.float32,
                quant_config=config,
                prefix="model.layers.0.mlp.experts",
            )

    if ignore is None:
        with pytest.raises(FPTQuantError, match="mixture-of-experts layers are not supported"):
            build()
        return
    layer = build()
    methods = [getattr(module, "quant_method", None) for module in layer.modules()]
    assert any(isinstance(method, UnquantizedFusedMoEMethod) for method in methods)


@pytest.mark.parametrize("kernel", ["marlin-int8", "triton-int8"])
def test_buffers_on_gpus_stay_where_they_are(
    kernel: str, operators: None, pretend_gpu: Callable[[int], None], serving: Callable[..., None]
) -> None:
    """CUDA graphs hold their addresses. Emulated: not run on hardware."""
    serving(additional_config={"fptquant": {"kernel": kernel}})
    config = quant_config(activations={"bits": 4, "symmetric": False}, transforms={"down_hadamard": {"block": 32}})
    torch.manual_seed(0)
    x = torch.randn(5, 96, dtype=torch.float16)
    model = torch.nn.Module()
    model.down_proj = build_linear("down", config, params_dtype=torch.float16)
    record_metadata_for_reloading(model)

    def load(seed: int) -> Tensor:
        for name, tensor in random_tensors("down", config, seed)[None].items():
            if name != "codes":
                parameter = getattr(model.down_proj, name)
                tensor = tensor.half().float() if name == "weight_scale" else tensor
                parameter.weight_loader(parameter, tensor)
        return expected(random_tensors("down", config, seed), x.float(), 4)

    load(0)
    model.down_proj.quant_method.process_weights_after_loading(model.down_proj)
    first = model.down_proj(x)[0]
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in model.named_buffers()}
    initialize_layerwise_reload(model)
    load(1)
    finalize_layerwise_reload(model, None)
    assert {name: (buffer, buffer.data_ptr()) for name, buffer in model.named_buffers()}.keys() == before.keys()
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and buffer.data_ptr() == before[name][1]
    fresh = torch.nn.Module()
    fresh.down_proj = build_linear("down", config, params_dtype=torch.float16)
    model, kept = fresh, model
    load(1)
    fresh.down_proj.quant_method.process_weights_after_loading(fresh.down_proj)
    assert torch.equal(kept.down_proj(x)[0], fresh.down_proj(x)[0]) and not torch.equal(kept.down_proj(x)[0], first)


def test_offloading_on_gpus(own: tuple[Path, Path], pretend_gpu: Callable[[int], None]) -> None:
    config = EngineArgs(str(own[0]), dtype="float16", cpu_offload_gb=1).create_engine_config()
    with pytest.raises(FPTQuantError, match="leave --cpu-offload-gb and --offload-group-size out"):
        require_supported_loading(config)
