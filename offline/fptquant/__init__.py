"""FPTQuant: function-preserving transforms and static INT4 quantization of Hugging Face checkpoints.

Importing the package registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained(OUT)` loads what `fptquant quantize` wrote.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# Not in the command itself: transformers and torch take seconds to import, and `fptquant.loading` imports it where a
# model is read.
if Path(sys.argv[0]).name != "fptquant":
    from fptquant import hf_quantizer as _hf_quantizer  # noqa: F401  (registers on import)
