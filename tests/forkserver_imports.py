"""Imports of the server of `tests/forkserver.py`, one for each process of pytest: it computes nothing, has no threads.

Of the plugin nothing: a test asks vLLM what it does without.
"""

import atexit
import gc
import os
from importlib import import_module
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

MODULES = ["fptquant.cli", "fptquant.pipeline", "tests.conftest"]
SERVING = [
    "vllm",
    "vllm.engine.arg_utils",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "tests.vllm_fptquant.serve_tokens",
]

for name in MODULES + (SERVING if find_spec("vllm") else []):
    import_module(name)
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # extensions that check for leaks at exit see everything gone
