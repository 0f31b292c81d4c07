"""Model families: the only place that knows module names. One file and one entry of `FAMILIES` each.

Nothing heavy is imported here: what transformers has to know of our checkpoints at its start follows from these facts.
"""

from fptquant.wiring.base import EMBEDDING, HEAD, Architecture, InputGroup, Place, Projection, Role, Shape
from fptquant.wiring.llama import LLAMA

FAMILIES: dict[str, Architecture] = {LLAMA.model_type: LLAMA}

__all__ = ["EMBEDDING", "FAMILIES", "HEAD", "Architecture", "InputGroup", "Place", "Projection", "Role", "Shape"]
