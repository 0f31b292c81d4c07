"""S_n: per-token scaling by the RMS of the residual, run online."""

from typing import Any

from fptquant.transforms.base import Transform


class ResidualScale(Transform):
    """The inputs of o_proj and down_proj times S = 1 / RMS(residual), their outputs divided by it.

    Nothing to train and nothing to merge: the layers compute S from the residual their norm reads
    (`fptquant.format.residual_scale`; FPTQuant section 3.1.3, method.md 1.6 form B).
    """

    name = "S_n"
    merged = False

    def online(self) -> dict[str, Any]:
        """On."""
        return {"residual_scale": True}
