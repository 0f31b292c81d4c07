"""What the user may set at serving time: `--additional-config '{"fptquant": {...}}'`.

vLLM makes `additional_config` part of its compile cache key, which an environment variable would not be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fptquant.errors import FPTQuantError
from fptquant.format.schema import one_line


class ServingOptions(BaseModel):
    """Options under the key `fptquant`; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: str | None = None  # or several with commas between, in order of preference
    exact: bool = False  # see `vllm_fptquant.exact`
    fast_hadamard: bool = False  # T_d in 16 bits, on GPUs: not what the checkpoint was made for, but close
    # Tokens of a step; None for the shipped table (`vllm_fptquant.kernels.marlin_cutlass`)
    widen_from: Annotated[int, Field(gt=0, strict=True)] | Literal["never"] | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> ServingOptions:
        """Reads the options of the engine that is being built.

        Args:
            vllm_config: `VllmConfig`, or None outside of an engine.

        Raises:
            FPTQuantError: unknown option or value of a wrong type.
        """
        additional = getattr(vllm_config, "additional_config", None) or {}
        given = additional.get("fptquant", {}) if isinstance(additional, dict) else {}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            raise FPTQuantError(f"--additional-config, key 'fptquant': {one_line(error)}: known: {known}") from None
