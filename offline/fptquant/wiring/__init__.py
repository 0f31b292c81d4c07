"""Model families: the only place that knows module names. One file and one entry of `FAMILIES` each.

Nothing heavy is imported here: what transformers has to know of our checkpoints at its start follows from these facts.
"""

from fptquant.wiring.base import Architecture
from fptquant.wiring.ernie4_5 import ERNIE4_5
from fptquant.wiring.fused import Fused
from fptquant.wiring.gemma2 import GEMMA2
from fptquant.wiring.gemma3 import GEMMA3
from fptquant.wiring.glm import GLM
from fptquant.wiring.glm4 import GLM4
from fptquant.wiring.granite import GRANITE
from fptquant.wiring.llama import LLAMA
from fptquant.wiring.ministral3 import MINISTRAL3
from fptquant.wiring.mistral import MISTRAL
from fptquant.wiring.mixtral import MIXTRAL
from fptquant.wiring.multimodal import GEMMA3 as GEMMA3_MULTIMODAL
from fptquant.wiring.multimodal import LLAVA, MISTRAL3, QWEN2_5_VL, QWEN2_VL, QWEN3_VL, Multimodal
from fptquant.wiring.phi3 import PHI3
from fptquant.wiring.qwen2 import QWEN2
from fptquant.wiring.qwen2_moe import QWEN2_MOE
from fptquant.wiring.qwen3 import QWEN3
from fptquant.wiring.qwen3_moe import QWEN3_MOE
from fptquant.wiring.roles import EMBEDDING, HEAD, SHARED, InputGroup, Place, Projection, Role
from fptquant.wiring.seed_oss import SEED_OSS
from fptquant.wiring.shape import Shape
from fptquant.wiring.smollm3 import SMOLLM3

FAMILIES: dict[str, Architecture] = {
    family.model_type: family
    for family in (
        LLAMA,
        QWEN2,
        QWEN3,
        MISTRAL,
        MINISTRAL3,
        SEED_OSS,
        GRANITE,
        SMOLLM3,
        ERNIE4_5,
        GEMMA3,
        GEMMA2,
        GLM,
        GLM4,
        QWEN3_MOE,
        QWEN2_MOE,
        MIXTRAL,
    )
}
# Those that are read as one of these: nothing that is written, or served, knows of them.
FUSED: dict[str, Fused] = {fused.model_type: fused for fused in (PHI3,)}
# Those whose text part is read as one of these.
MULTIMODAL: dict[str, Multimodal] = {
    multimodal.model_type: multimodal
    for multimodal in (MISTRAL3, GEMMA3_MULTIMODAL, QWEN3_VL, QWEN2_5_VL, QWEN2_VL, LLAVA)
}

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "FUSED",
    "HEAD",
    "MULTIMODAL",
    "SHARED",
    "Architecture",
    "Fused",
    "InputGroup",
    "Multimodal",
    "Place",
    "Projection",
    "Role",
    "Shape",
]
