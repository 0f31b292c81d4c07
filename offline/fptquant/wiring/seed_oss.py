"""Seed-OSS: biases of queries, keys and values, and of the output where the configuration says so."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

SEED_OSS = replace(
    LLAMA,
    model_type="seed_oss",
    name="SeedOss",
    models="Seed-OSS",
    output_bias="attention_out_bias",
)
