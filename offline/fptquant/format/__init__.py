"""The contract between the two halves: schema, packing and quantizer arithmetic.

Beside the families' facts, the only part of `fptquant` that the serving plugin imports. It imports neither vLLM nor
training code.
"""

from fptquant.format.arithmetic import (
    attention,
    block_hadamard,
    code_bounds,
    exact_attention,
    hadamard_factors,
    position_scale,
    quantize,
    quantize_per_tensor,
    quantized_linear,
    residual_scale,
    softcap,
)
from fptquant.format.packing import pack_codes, packed_words, per_column, round_scale, row_bytes, unpack_codes
from fptquant.format.schema import (
    FORMAT_VERSION,
    MODEL_TYPE_PREFIX,
    QUANT_METHOD,
    CheckpointConfig,
    DownHadamard,
    InputHadamard,
    Sink,
    TransformRecord,
    quantized_architecture,
)
from fptquant.schemes import (
    ActivationScheme,
    KVCacheScheme,
    LinearScheme,
    Override,
    WeightScheme,
    match_name,
)

__all__ = [
    "FORMAT_VERSION",
    "MODEL_TYPE_PREFIX",
    "QUANT_METHOD",
    "ActivationScheme",
    "CheckpointConfig",
    "DownHadamard",
    "InputHadamard",
    "KVCacheScheme",
    "LinearScheme",
    "Override",
    "Sink",
    "TransformRecord",
    "WeightScheme",
    "attention",
    "block_hadamard",
    "code_bounds",
    "exact_attention",
    "hadamard_factors",
    "match_name",
    "pack_codes",
    "position_scale",
    "packed_words",
    "per_column",
    "quantize",
    "quantize_per_tensor",
    "quantized_linear",
    "residual_scale",
    "quantized_architecture",
    "round_scale",
    "row_bytes",
    "softcap",
    "unpack_codes",
]
