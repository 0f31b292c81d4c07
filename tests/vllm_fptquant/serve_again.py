"""Embeds with one checkpoint, then generates with it and with another in its place: answers as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tests.vllm_fptquant.serve_tokens  # noqa: F401  sets the environment
from tests.vllm_fptquant.serving import NEW_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("prompts", type=json.loads)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    prompts = [{"prompt_token_ids": prompt} for prompt in arguments.prompts]
    embedding = LLM(str(arguments.first), runner="pooling", convert="embed", **options)
    embeddings = [answer.outputs.embedding for answer in embedding.embed(prompts)]

    generating = LLM(str(arguments.first), skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)

    def tokens() -> list[list[int]]:
        return [list(answer.outputs[0].token_ids) for answer in generating.generate(prompts, sampling)]

    first = tokens()
    generating.collective_rpc("reload_weights", kwargs={"weights_path": str(arguments.second)})
    generating.reset_prefix_cache()
    arguments.output.write_text(json.dumps({"embeddings": embeddings, "first": first, "second": tokens()}))


if __name__ == "__main__":
    main()
