"""Which model families there are and what holds for them, for users to read: `fptquant families`, docs/families.md.

python -m fptquant.report.families > docs/families.md
"""

from __future__ import annotations

from collections.abc import Mapping

import transformers

from fptquant.transforms import TRANSFORMS
from fptquant.wiring import FAMILIES, FUSED, MULTIMODAL, Architecture, Fused

COLUMNS = ("model_type", "models", "transforms", "attention")
_WINDOWS = {
    "none": "to all tokens",
    "all": "to a window, where `sliding_window` is set",
    "by type": "to a window in the layers that `layer_types` names",
}
_PAGE = """# Model families

Written by `python -m fptquant.report.families`; `fptquant families` prints the table.

{table}

All are served by the plugin's own class, S_n and a constant first token included: on CPUs as the simulation in
transformers computes (`tests/vllm_fptquant/test_served_families.py`); on GPUs, only Llama was run.

{fused}
Of a multimodal model only the text part is read, quantized and served, as a model of the family whose function it has
on text. Weights of images are left out, which the plan says.

What is not in the table is refused by name, before any work: another `model_type`, `architectures` of another family
than `model_type`, a multimodal model of another kind or with another text part, a sequence classifier. A transform
that a family can't have is an error where your own recipe names it; of a shipped recipe it is left out, and the plan
says why, and what takes its place.

Where blocks end in norms (Gemma, GLM-4), the gains of all norms stay where they are, as in every model without T_r
and S_n, which alone need them in the weights. In Gemma-3-270M one channel holds nearly all of the residual, and its
gain makes it as small as the others again: 8 bits hold what a norm puts out with its gain, and little of what it would
without ([accuracy](accuracy.md#gemma-3)).

Activations of Gemma don't fit into float16, which is refused, offline and when serving: bfloat16 or float32. Where
scores are bounded (Gemma 2), transformers' `sdpa` leaves the bound out; here it is never left out.

A first token can be constant in all of them, with windows too, but where RoPE scales keys (yarn, longrope with a
factor).

To add a family see `CONTRIBUTING.md`.
"""


def rows() -> list[tuple[str, str, str, str]]:
    """A row of `COLUMNS` for each family."""
    listed = [(family.model_type, family.models, family) for family in FAMILIES.values()]
    listed += [(fused.model_type, fused.models, fused.windowed) for fused in FUSED.values()]
    texts = [
        (facts.model_type, facts.models, f"text part only: a {' or '.join(facts.texts.values())}", "as there")
        for facts in MULTIMODAL.values()
    ]
    return [
        (model_type, models, _transforms(family), _WINDOWS[family.windows]) for model_type, models, family in listed
    ] + texts


def page() -> str:
    """The content of docs/families.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows()]
    fused = [*map(_fused, FUSED.values()), _apart()]
    return _PAGE.format(table="\n".join(f"| {' | '.join(line)} |" for line in lines), fused="\n".join(fused))


def _fused(fused: Fused) -> str:
    return (
        f"{fused.model_type} stores {_named(fused.weights)} fused: their rows are read apart, and what is written is a "
        f"{fused.family.model_type},\nor with a `sliding_window` a {fused.windowed.model_type}. RoPE of a part of each "
        "head or of type longrope is refused.\n"
    )


def _apart() -> str:
    stored: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        if family.fused:
            stored.setdefault(_named(family.fused), []).append(family.model_type)
    lines = (f"{' and '.join(names)} store {weights} fused" for weights, names in stored.items())
    return f"{'; '.join(lines)}: its rows are read, written and served apart.\n"


def _named(weights: Mapping[str, object]) -> str:
    return " and ".join(f"`{path.rpartition('.')[2]}`" for path in weights)


def _transforms(family: Architecture) -> str:
    shape = family.shape(getattr(transformers, family.class_of("Config"))())
    limits = []
    for name, transform in TRANSFORMS.items():
        obstacle, restriction = transform.obstacle(family), transform.form(shape).restriction
        if obstacle is not None:
            substitute = transform.substitute
            limits.append(f"no {name} ({obstacle})" + (f", {substitute} in its place" if substitute else ""))
        elif restriction:
            limits.append(f"{name}: {restriction}")
    if all(transform.obstacle(family) for transform in TRANSFORMS.values() if transform.folds_gains):
        limits.append("gains stay in the norms")
    return "; ".join(limits) or "all"


if __name__ == "__main__":
    print(page(), end="")
