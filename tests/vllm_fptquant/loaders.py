"""A checkpoint directory through both loaders, in this process: its logits, or the one line that refuses it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

TOKENS = torch.tensor([0, 5, 17, 100, 9, 30])
Outcome = Tensor | str


def attend(self: Attention, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """In place of `Attention.forward`, where there is no KV cache: every token sees itself only."""
    heads = (key + value).unflatten(1, (-1, self.head_size))
    heads = heads.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
    return (query + heads.flatten(1)) / 8


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """VLLM's distributed state for a world of one, without a KV cache."""

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "forward", attend)
        config = EngineArgs(str(Path(__file__).parent.parent / "golden" / "w4a16")).create_engine_config()
        with set_current_vllm_config(config):
            parallel_state.init_distributed_environment(1, 0, f"file://{folder}/world", 0, "gloo")
            parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def reason(error: Exception) -> str:
    """What a user reads of an error; pydantic's carries ours within."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"])
    return str(error)


def in_transformers(checkpoint: Path, **arguments: Any) -> Outcome:
    """Logits (tokens, vocabulary) of the simulation in float32."""
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {reason(error)}"
    with torch.no_grad():
        return model(TOKENS[None], use_cache=False).logits[0]


def in_vllm(checkpoint: Path, **arguments: Any) -> Outcome:
    """Logits (tokens, vocabulary) of the served model in float32, without a KV cache."""
    try:
        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, **arguments}
        config = EngineArgs(str(checkpoint), **settings).create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
            # what `load_model` does, which needs an accelerator in vLLM's main process
            model = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    except Exception as error:
        return f"{type(error).__name__}: {reason(error)}"
    with set_forward_context(None, config), torch.inference_mode():
        return model.compute_logits(model(TOKENS, torch.arange(len(TOKENS))))
