"""A checkpoint's tensors against the configuration that vLLM computes with (`fptquant.format.binding`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from fptquant.errors import FPTQuantError, is_out_of_memory
from fptquant.format.binding import UNBOUND, Binding, Watch
from fptquant.format.checks import DAMAGED, require_consistent
from fptquant.format.schema import MODEL_TYPE_PREFIX
from fptquant.wiring import FAMILIES

logger = init_logger(f"vllm.{__name__}")


def require_bound_config(vllm_config: Any) -> Binding | None:
    """Compares the configuration in effect, with what the user overrides at start, before the model is built.

    Only where the checkpoint is a local directory; files that come later are left to `require_bound_tensors`.

    Returns:
        The binding, where it is known already.

    Raises:
        FPTQuantError: names the field; or a weight file is truncated.
    """
    model, checkpoint = vllm_config.model_config, vllm_config.quant_config.checkpoint
    family = FAMILIES[model.hf_config.model_type.removeprefix(MODEL_TYPE_PREFIX)]
    require_consistent(checkpoint, model.hf_config, family.shape(model.hf_config).widths)
    binding = Binding.of_directory(Path(model.model))
    if binding is not None:
        binding.require_config(model.hf_config, checkpoint)
    return binding


@contextmanager
def one_line_errors(watch: Watch) -> Iterator[None]:
    """Names the tensor and the remedy where vLLM can't place one, for which it has an assertion or a `KeyError`.

    Raises:
        FPTQuantError: as said.
    """
    try:
        yield
    except (AssertionError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FPTQuantError) or is_out_of_memory(error):
            raise
        why = " ".join(str(error).split())
        raise FPTQuantError(
            f"{watch.current} does not fit the model of config.json{f' ({why})' if why else ''}: {DAMAGED}"
        ) from None


def require_bound_tensors(watch: Watch, vllm_config: Any, *, all_of_them: bool) -> None:
    """Compares the tensors that were loaded, and the configuration again; warns of a checkpoint that isn't bound.

    Args:
        watch: saw them go by.
        vllm_config: the engine's.
        all_of_them: whether it was the whole checkpoint, and not a piece of one for a model that runs.

    Raises:
        FPTQuantError: a tensor or field differs, or the binding is missing.
    """
    model, checkpoint = vllm_config.model_config, vllm_config.quant_config.checkpoint
    if not watch.require_bound(model.hf_config, checkpoint, all_of_them=all_of_them) and all_of_them:
        logger.warning_once(UNBOUND, model.model)
