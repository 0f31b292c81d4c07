"""Gemma 3, its text models: as Gemma 2, with norms of queries and keys, two bases of RoPE, no bound of scores."""

from dataclasses import replace

from fptquant.wiring.gemma2 import GEMMA2

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    name="Gemma3",
    models="Gemma 3 (text)",
    query_norm="q_norm",
    key_norm="k_norm",
    score_cap=None,  # transformers has the field, and leaves it out of account
    class_names={"Model": "Gemma3TextModel", "Config": "Gemma3TextConfig"},
)
