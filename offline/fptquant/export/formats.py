"""Formats to export to, and why not to others; found without importing torch."""

from __future__ import annotations

from fptquant.errors import FPTQuantError, unknown

COMPRESSED_TENSORS = "compressed-tensors"
FLOAT = "float"
FORMATS = (COMPRESSED_TENSORS, FLOAT)
_IMPOSSIBLE = {
    "gguf": "llama.cpp's convert_hf_to_gguf.py, which knows its names of tokenizers, makes it of --format float",
    "humming": "no vLLM up to 0.33 loads static INT4 activations with one scale per channel there (docs/export.md): "
    "take --format compressed-tensors",
}


def require_format(name: str, *, online: str = "undo") -> None:
    """Raises FPTQuantError: a format that nothing is exported to, or not with online Hadamards, and why."""
    if name in _IMPOSSIBLE:
        raise FPTQuantError(f"--format {name}: {_IMPOSSIBLE[name]}")
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    if name == FLOAT and online == "keep":
        raise FPTQuantError("--online keep: nothing but compressed-tensors has Hadamards that stay: leave it out")
