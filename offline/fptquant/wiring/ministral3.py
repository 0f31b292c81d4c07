"""Ministral 3: queries grow with their position."""

from dataclasses import replace

from fptquant.wiring.mistral import MISTRAL

MINISTRAL3 = replace(
    MISTRAL, model_type="ministral3", name="Ministral3", models="Ministral 3 (text)", scales_queries=True
)
