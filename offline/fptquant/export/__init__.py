"""A checkpoint in the format of compressed-tensors, for vLLM and transformers without this package.

What their arithmetic can't express is replaced by the nearest that it can, listed, and measured.
"""
