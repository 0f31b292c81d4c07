"""S_n: per-token scaling by the RMS of the residual, run online."""

from typing import Any

from fptquant.transforms.base import Transform
from fptquant.wiring import Architecture


class ResidualScale(Transform):
    """The inputs of o_proj and down_proj times S = 1 / RMS(residual), their outputs divided by it.

    Nothing to train and nothing to merge: the layers compute S from the residual their norm reads
    (`fptquant.format.residual_scale`; FPTQuant section 3.1.3, method.md 1.6 form B).
    """

    name = "S_n"
    merged = False
    folds_gains = True

    @classmethod
    def obstacle(cls, architecture: Architecture) -> str | None:
        """A norm behind the block makes outputs relative to their own size, whatever S is."""
        return "blocks end in norms, to which S makes no difference" if architecture.post_norms else None

    def online(self) -> dict[str, Any]:
        """Switches the residual scale on in the checkpoint's record of transforms."""
        return {"residual_scale": True}
