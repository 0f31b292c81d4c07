"""Serves exports on vLLM without the plugin, one after the other, in a process of its own; answers go to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.vllm_fptquant.serve_tokens import ENVIRONMENT, serve_tokens


def main() -> None:
    """Reads a request, {"models": {directory: dtype}, "prompts": ..., "max_tokens": ...}, and writes the answers."""
    os.environ.update(ENVIRONMENT | {"VLLM_PLUGINS": ""})
    request = json.loads(Path(sys.argv[1]).read_text())
    answers = {
        name: serve_tokens(Path(name), request["prompts"], request["max_tokens"], dtype=dtype, quantization=None)
        for name, dtype in request["models"].items()
    }
    ours = [name for name in sys.modules if name.partition(".")[0] == "vllm_fptquant"]
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers, "plugin": ours}))


if __name__ == "__main__":
    main()
