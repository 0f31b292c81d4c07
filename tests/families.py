"""Tiny random models of every family, in the variants that compute differently.

What is in `FAMILIES`, `FUSED` or `MULTIMODAL` must be here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fptquant.loading import attention_for, load_model, open_source
from fptquant.recipe import Recipe
from fptquant.run.job import Job, open_job
from fptquant.simulate.mixture import separate_projections
from fptquant.transforms import TRANSFORMS
from fptquant.wiring import FAMILIES, FUSED, MULTIMODAL, Architecture
from tests.conftest import TEXT, VOCABULARY, build_tokenizer, randomized

WINDOW = 12
SHIFTED: dict[str, Any] = {"activation_range": {"shift": "all"}, "kv_range": {"shift": "all"}}  # of a recipe
SIZES = {
    "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16,
    "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip

_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 20}
_CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 20.0}  # low enough to matter

# name: model type, what its configuration says beside the sizes
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", _SLIDING),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3 with windows": ("qwen3", {**_SLIDING, "attention_bias": True, "head_dim": 32}),
    "mistral": ("mistral", {"head_dim": 64, "sliding_window": None}),
    "mistral with windows": ("mistral", {"sliding_window": WINDOW}),
    "ministral3": ("ministral3", {"head_dim": 32, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5}}),
    "ministral3 with windows": (
        "ministral3",
        {"head_dim": 32, "sliding_window": WINDOW, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5}},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "seed_oss with all biases": ("seed_oss", {"head_dim": 64, "attention_out_bias": True, "mlp_bias": True}),
    "granite": (
        "granite",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.11,
            "logits_scaling": 8.0,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3 with windows": (
        "smollm3",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True},
    ),
    "gemma3_text": (
        "gemma3_text",
        {**_GEMMA, "layer_types": ["full_attention"] * 2, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3_text with windows": (
        "gemma3_text",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
        },
    ),
    "gemma2": ("gemma2", {**_GEMMA, **_CAPS, "layer_types": ["full_attention"] * 2, "attention_bias": True}),
    "gemma2 with windows": (
        "gemma2",
        {**_GEMMA, **_CAPS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
    ),
    "glm": ("glm", {"head_dim": 64}),
    "glm, tied": ("glm", {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
    "glm4": ("glm4", {"head_dim": 64, "attention_bias": False}),
    "glm4 with biases": ("glm4", {"head_dim": 32, "partial_rotary_factor": 0.25}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, "norm_topk_prob": True, **_EXPERTS}),
    "qwen3_moe with windows": (
        "qwen3_moe",
        {**_SLIDING, "head_dim": 32, "attention_bias": True, "mlp_only_layers": [0], **_EXPERTS},
    ),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 80, **_EXPERTS}),
    "qwen2_moe with windows": (
        "qwen2_moe",
        {
            **_SLIDING,
            "shared_expert_intermediate_size": 80,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            **_EXPERTS,
        },
    ),
    "mixtral": ("mixtral", {"head_dim": 64, "num_local_experts": 4}),
    "mixtral with windows": ("mixtral", {"sliding_window": WINDOW, "num_local_experts": 3, "num_experts_per_tok": 1}),
    "phi3": ("phi3", {"tie_word_embeddings": True}),
    "phi3 with windows": ("phi3", {"head_dim": 64, "sliding_window": WINDOW}),
    "ernie4_5": ("ernie4_5", {"head_dim": 64}),
    "ernie4_5 with biases": ("ernie4_5", {"head_dim": 32, "use_bias": True, "tie_word_embeddings": False}),
}

_IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_IMAGES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}

# name: model type, what its text_config says beside the sizes, its vision_config, what it says outside of them
MULTIMODAL_VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 64, "sliding_window": None},
        {"model_type": "pixtral", **_IMAGES},
        {"tie_word_embeddings": False},
    ),
    "mistral3, ministral3": (
        "mistral3",
        {
            "model_type": "ministral3",
            "head_dim": 32,
            "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5},
        },
        {"model_type": "pixtral", **_IMAGES},
        {},  # tied by default
    ),
    "gemma3": (
        "gemma3",
        {
            **_GEMMA,
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
        },
        _IMAGES,
        {"eos_token_id": [1, 5]},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"head_dim": 32, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        {**_QWEN_IMAGES, "out_hidden_size": 128, "deepstack_visual_indexes": [0]},
        {"tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"rope_parameters": _MROPE, **_SLIDING},
        {**_QWEN_IMAGES, "out_hidden_size": 128},
        {},
    ),
    "qwen2_vl": ("qwen2_vl", {"rope_parameters": _MROPE}, {**_QWEN_IMAGES, "embed_dim": 32, "hidden_size": 128}, {}),
    "llava": ("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **_IMAGES}, {}),
    "llava, mistral": (
        "llava",
        {"model_type": "mistral", "sliding_window": WINDOW},
        {"model_type": "pixtral", **_IMAGES},
        {},
    ),
}

BY_FAMILY = {
    model_type: [variant for variant, (found, _) in VARIANTS.items() if found == model_type]
    for model_type in (*FAMILIES, *FUSED)
}


def family_of(variant: str) -> Architecture:
    """As which a model of the variant is read."""
    if variant in MULTIMODAL_VARIANTS:
        model_type, text, _, _ = MULTIMODAL_VARIANTS[variant]
        texts = MULTIMODAL[model_type].texts
        return FAMILIES[texts[text.get("model_type", next(iter(texts)))]]
    model_type, fields = VARIANTS[variant]
    return FUSED[model_type].becomes(fields) if model_type in FUSED else FAMILIES[model_type].of(config_of(variant))


def config_of(variant: str, **changes: Any) -> PretrainedConfig:
    model_type, fields = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields, **changes})
    config.architectures = [(FUSED | FAMILIES)[model_type].class_name]
    return config


def build(variant: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """In float32, with gains of mean 1 and deviation 0.4, and biases: ones and zeros would hide errors."""
    config = config_of(variant, **changes)
    family = family_of(variant)
    config._attn_implementation = attention_for(config).get("attn_implementation", "sdpa")
    model = getattr(transformers, config.architectures[0])(config)
    model.config._experts_implementation = "eager"  # the one that computes in float64
    model = trained_looking(model, seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.sub_(family.gain_offset)
    return model


def read(variant: str) -> PreTrainedModel:
    """As `build`, in the modules that it is worked on in: its projections apart, or as the family that it becomes."""
    if VARIANTS[variant][0] not in FUSED:
        return separate_projections(build(variant), family_of(variant))
    model = copy.deepcopy(split(variant))
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(model.config)  # in float64 where a test computes so
    return model


@cache
def split(variant: str) -> PreTrainedModel:
    """A fused model, saved and read."""
    with TemporaryDirectory() as folder:
        build(variant).save_pretrained(folder)
        build_tokenizer(bos=True).save_pretrained(folder)
        return load_model(open_source(folder))


def save_multimodal(variant: str, folder: Path) -> PreTrainedModel:
    """Saves a model as the hub has it, and returns it in transformers' class."""
    model_type, text, images, fields = MULTIMODAL_VARIANTS[variant]
    config = AutoConfig.for_model(model_type, text_config={**SIZES, **text}, vision_config=images, **fields)
    model = trained_looking(getattr(transformers, MULTIMODAL[model_type].class_name)(config))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.sub_(family_of(variant).gain_offset)
    model.save_pretrained(folder)
    build_tokenizer(bos=True).save_pretrained(folder)
    return model


def trained_looking(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    return randomized(model, seed, gain=0.4, bias=0.3, embedding=1.0)


def possible(variant: str, names: Iterable[str]) -> list[str]:
    """Those of the transforms that the family can have, and what takes the place of others, as in shipped recipes."""
    found = (
        name if TRANSFORMS[name].obstacle(family_of(variant)) is None else TRANSFORMS[name].substitute for name in names
    )
    return list(dict.fromkeys(filter(None, found)))


def make_job(variant: str, path: Path, **fields: Any) -> Job:
    """A job on a model of `variant`, saved in `path`, with transforms at random values."""
    model = path / "model"
    if not model.is_dir():
        if variant in MULTIMODAL_VARIANTS:
            save_multimodal(variant, model)
        else:
            build(variant).save_pretrained(model)
            build_tokenizer(bos=True).save_pretrained(model)
    (path / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    calibration = {"source": str(path / "text.txt"), "sequences": 4, "length": 32}
    job = open_job(
        model, Recipe.parse({"calibration": calibration, "training": {"sequences": 6, "length": 24}, **fields})
    )
    job.transforms.randomize_(torch.Generator().manual_seed(4), 0.2)
    return job
