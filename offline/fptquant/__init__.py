"""FPTQuant: function-preserving transforms and static INT4 quantization of Hugging Face checkpoints.

Importing the package registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained(OUT)` loads what `fptquant quantize` wrote.
"""

__version__ = "0.1.0"

from fptquant import hf_quantizer as _hf_quantizer  # noqa: E402, F401  (registers on import)
