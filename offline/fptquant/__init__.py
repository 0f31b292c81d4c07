"""FPTQuant: function-preserving transforms and static INT4 quantization of Hugging Face checkpoints.

An installed package registers the checkpoint format with transformers by itself, so that
`AutoModelForCausalLM.from_pretrained(OUT)` loads what `fptquant quantize` wrote. Importing the package does it
too, for a source tree that isn't installed; it imports neither torch nor transformers.
"""

import fptquant_autoload

__version__ = "0.1.0"

fptquant_autoload.install()
