"""What any matrix per KV head brings T_k in a layer without RoPE, beside scaled rotations of pairs, on a real model.

    OMP_NUM_THREADS=1 python benchmarks/bench_no_rope.py MODEL

There is no small trained model with such layers, so every fourth layer of MODEL, a Llama, is taken as if it had no
RoPE: its weights, and its queries and keys in front of RoPE on the shipped calibration text. T_k is trained on the
weights alone, as in stage 1 of `fptquant-light`. Columns, means over the layers: the local objective; relative squared
error of query and key weights at 4 bits, to nearest; and of scores with static keys at 8 and 4 bits, one range for all.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import resources

import torch
from torch import Tensor, nn

from fptquant.loading import Source, load_model, open_source
from fptquant.quantize import RangeOptions, WeightRangeOptions, search_range, weight_scales
from fptquant.recipe import Recipe
from fptquant.train.local import weight_norm
from fptquant.train.optimization import Optimization, transform_groups
from fptquant.transforms import TransformSet
from fptquant.wiring import Place, Role

TOKENS = 512
ROLES = (Role.QUERY, Role.KEY)
COLUMNS = ("T_k", "objective", "W_q, 4 bits", "W_k, 4 bits", "scores, K 8 bits", "scores, K 4 bits")


def states(source: Source, model: nn.Module, layers: list[int]) -> dict[Place, Tensor]:
    """Queries and keys (tokens, heads * head_dim) in front of RoPE; the first token, an outlier, is left out."""
    found: dict[Place, Tensor] = {}
    for layer, role in ((layer, role) for layer in layers for role in ROLES):
        projection = source.architecture.projection_of(role)
        place = projection.at(layer)

        def keep(module: nn.Module, args: object, output: Tensor, place: Place = place) -> None:
            found[place] = output[0, 1:]

        model.get_submodule(source.architecture.projection_name(layer, projection)).register_forward_hook(keep)
    text = (resources.files("fptquant") / "data" / "wiki.calib.txt").read_text(encoding="utf-8")[:20_000]
    model(torch.tensor(source.tokenizer(text)["input_ids"][:TOKENS])[None], use_cache=False)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """Squared, relative."""
    return float((found - expected).square().sum() / expected.square().sum())


def rounded(values: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Values of a quantizer's codes."""
    codes = ((values / scale).round() + zero_point).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes - zero_point) * scale


def scores(queries: Tensor, keys: Tensor, head_dim: int) -> Tensor:
    """(heads, tokens, tokens), each row without its mean, which softmax does not see."""
    q, k = (x.view(len(x), -1, head_dim).transpose(0, 1) for x in (queries, keys))
    found: Tensor = q @ k.repeat_interleave(len(q) // len(k), 0).mT
    return found - found.mean(-1, keepdim=True)


def measure(
    weights: dict[Place, Tensor], seen: dict[Place, Tensor], transforms: TransformSet, head_dim: int
) -> list[float]:
    """Means over the layers of what the table shows, with the transforms at their present values."""
    rows = []
    for layer in sorted({place.layer for place in weights}):
        query, key = (Place(role, layer) for role in ROLES)
        merged = {place: transforms.merge(place, weights[place], None)[0] for place in (query, key)}
        row = [sum(float(weight_norm(weight, 4)) for weight in merged.values())]
        row += [error(rounded(w, weight_scales(w, 4, WeightRangeOptions()), 0, 4), w) for w in merged.values()]
        q, k = (transforms.outputs(place, seen[place]) for place in (query, key))
        for bits in (8, 4):
            kept = rounded(k, *search_range(k, bits, False, RangeOptions()), bits)
            row.append(error(scores(q, kept, head_dim), scores(q, k, head_dim)))
        rows.append(row)
    return torch.tensor(rows).mean(0).tolist()


def main() -> None:
    """Prints the table."""
    source, options = open_source(sys.argv[1]), Recipe.load("fptquant-light").local
    model, shape = load_model(source), source.architecture.shape(source.config)
    layers = list(range(3, shape.layers, 4))
    with torch.no_grad():
        seen = states(source, model, layers)
    weights = {
        projection.at(layer): model.get_parameter(f"{source.architecture.projection_name(layer, projection)}.weight")
        for layer in layers
        for projection in map(source.architecture.projection_of, ROLES)
    }
    forms: list[tuple[str, list[str], tuple[int, ...]]] = [
        ("none", [], ()),
        ("pairs", ["T_k"], ()),
        ("any matrix", ["T_k"], tuple(layers)),
    ]
    print(" | ".join(COLUMNS))
    for name, named, unrotated in forms:
        transforms = TransformSet(
            Recipe.parse({"transforms": named}).transforms, replace(shape, unrotated=unrotated), seed=0
        )
        if named:
            groups = transform_groups(transforms, options.rate, 0.0)
            optimization = Optimization(groups, options.steps, clip=None)
            for _ in range(options.steps):
                for place, weight in weights.items():
                    weight_norm(transforms.merge(place, weight, None)[0], options.p).backward()  # type: ignore[no-untyped-call]
                optimization.update()
        with torch.no_grad():
            found = measure(weights, seen, transforms, shape.head_dim)
        print(" | ".join([name, *(f"{value:.5f}" for value in found)]), flush=True)


if __name__ == "__main__":
    main()
