"""The table that tells methods apart: what each part of FPTQuant brings, and all recipes, on one real model.

Model: SmolLM2-135M-Instruct, a dequantized GGUF; in "families" one model of each family that there is. Texts: the
first windows of tests/data/wiki.test.txt and moby.test.txt, without special tokens. Calibrated and trained on the
shipped text only. Everything is simulated; what is
served equals the simulation (benchmarks/accuracy.py). Results are written to `--work` as they come and aren't measured
again, so this takes hours once and can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from results_page import FAMILIES, FAMILY_PRECISIONS, TEXTS, write_page

from fptquant.recipe import Recipe
from fptquant.transforms import FPTQUANT

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
PRECISIONS = ("w4a8kv8", "w4a4kv8", "w4a4kv4")
# Parts of the page, and at which precisions they are measured.
PARTS = {
    "ladder": PRECISIONS,
    "recipes": ("w4a8kv8", "w4a4kv4"),
    "left out": ("w4a4kv4",),
    "choices": ("w4a4kv4",),
    "as shipped": ("w4a8kv8", "w4a4kv4"),
    "families": FAMILY_PRECISIONS,
}
FAMILY_WINDOWS = 12  # of each text, where models are larger
ALL = list(FPTQUANT)
# A quarter of the default, to save time.
SAME_CALIBRATION: dict[str, Any] = {"calibration": {"sequences": 16}}
TRAINED = Recipe.load("fptquant").to_dict()
# A third of the training of "fptquant", for comparisons of many rows.
SHORT: dict[str, Any] = {
    "recipe": "fptquant",
    **SAME_CALIBRATION,
    "local": {"steps": 20},
    "end_to_end": {"steps": 30},
    "scales": {"steps": 50},
}
LIGHT: dict[str, Any] = {"recipe": "fptquant-light", **SAME_CALIBRATION}


def short_with(**fields: Any) -> dict[str, Any]:
    """The shortened recipe with other settings in both stages that train against the original."""
    return {**SHORT, **{stage: {**SHORT[stage], **fields} for stage in ("end_to_end", "scales")}}


# Each rung adds to the one before.
LADDER: dict[str, dict[str, Any]] = {
    "nearest, min-max": {
        **SAME_CALIBRATION,
        "transforms": [],
        "sink": "none",
        "rounding": {"method": "nearest"},
        **{key: {"method": "minmax"} for key in ("weight_range", "activation_range", "kv_range")},
    },
    "+ L_p ranges": {
        "weight_range": {"method": "lp"},
        "activation_range": {"method": "lp"},
        "kv_range": {"method": "lp"},
    },
    "+ T_r, T_d": {"transforms": ["T_r", "T_d"]},
    "+ T_k, T_v, T_u": {"transforms": ALL[:5]},
    "+ S_n": {"transforms": ALL},
    "+ GPTQ": {"rounding": {"method": "gptq"}},
    "+ first token constant": {"sink": "auto"},
    "+ scales and ranges trained": {"scales": TRAINED["scales"]},
    "+ stage 1": {"local": TRAINED["local"]},
    "+ stage 2": {"end_to_end": {**TRAINED["end_to_end"], "activations": "all"}},  # the recipe has it at 4 bits only
    "+ 64 calibration sequences": {"calibration": TRAINED["calibration"]},
}
DYNAMIC = "+ first token constant, dynamic per token"
RECIPES = (
    "rtn",
    "gptq",
    "smoothquant",
    "quarot",
    "omniquant",
    "spinquant",
    "ostquant",
    "fptquant-light",
    "fptquant",
)
LEFT_OUT = {
    "nothing": SHORT,
    **{name: {**SHORT, "transforms": [other for other in ALL if other != name]} for name in ALL},
    "constant first token": {**SHORT, "sink": "none"},
    "stage 1": {**SHORT, "local": {"steps": 0}},
    "stage 2": {**SHORT, "end_to_end": {"steps": 0}},
    "scales and ranges": {**SHORT, "scales": {"steps": 0}},
}
CHOICES = {
    **{f"objective {name}": short_with(objective=name) for name in ("jsd", "kl", "kl_top", "cross_entropy")},
    "gradients: trust estimator": short_with(estimator="trust"),
    "stage 2 with rounded weights": {**SHORT, "end_to_end": {**SHORT["end_to_end"], "weights": "quantized"}},
    **{f"fptquant-light, p = {p}": {**LIGHT, "local": {"p": p}} for p in (2.0, 4.0, 8.0)},
    "fptquant-light, 12 sites of 8 bits": {**LIGHT, "budget": {"sites": 12}},
    "spinquant, constant first token": {"recipe": "spinquant", **SAME_CALIBRATION, "sink": "auto"},
}
# With the calibration that they come with: 64 sequences, 128 in the last.
SHIPPED = {name: {"recipe": name} for name in ("fptquant-light", "fptquant", "fptquant-best")}
# Of each model: what is done in minutes, as shipped, and a third of the training of scales and ranges.
FAMILY_RECIPES = {"fptquant-light": SHIPPED["fptquant-light"], "scales trained": {**LIGHT, "scales": {"steps": 50}}}
FAMILY_ROWS = {
    f"{model}: {name}": {**fields, "model": model} for model in FAMILIES for name, fields in FAMILY_RECIPES.items()
}
ORDER = [*LADDER, DYNAMIC, *RECIPES, *LEFT_OUT, *CHOICES, *SHIPPED, *FAMILY_ROWS]  # of rows, in every table


def main() -> None:
    """Measures what is missing and writes docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "results")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="of the trained rows of recipes")
    known = list(dict.fromkeys(precision for precisions in PARTS.values() for precision in precisions))
    parser.add_argument("--precisions", nargs="*", choices=known, default=known)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--keep", action="store_true", help="keep every checkpoint, not only its results")
    parser.add_argument("--report", action="store_true", help="write the page from what was measured, measure nothing")
    parser.add_argument("--published", action="store_true", help="where nothing was measured, go on from docs/")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.published and not (arguments.work / "results.json").exists():
        shutil.copy(ROOT / "docs" / "results.json", arguments.work)
    results = Results(arguments.work / "results.json")
    if not arguments.report:
        for name, fields in rows(arguments):
            windows = arguments.windows if "model" not in fields else FAMILY_WINDOWS
            if name not in results.rows or results.rows[name]["windows"] != windows:
                found = None if "model" in fields else results.twin(name, fields, windows)
                results.add(name, found or measure(name, fields, windows, arguments))
    print(write_page(results.rows, arguments.windows, ORDER, ROOT / "docs"))


class Results:
    """Rows measured so far, in a JSON file."""

    def __init__(self, file: Path) -> None:
        """Reads what is there."""
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Reads what is there, also from a run beside this one."""
        if self.file.is_file():
            self.rows = json.loads(self.file.read_text())

    def twin(self, name: str, fields: dict[str, Any], windows: int) -> dict[str, Any] | None:
        """A row with the same recipe under another name."""
        digest = row_recipe(fields).digest()
        same = (row for key, row in self.rows.items() if row.get("recipe") == digest and DYNAMIC not in key)
        found = None if DYNAMIC in name else next(same, None)
        return found if found and found["windows"] == windows else None

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a row."""
        with FileLock(self.file.with_suffix(".lock")):
            self.read()
            self.rows[name] = row
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.rows, indent=2) + "\n")
            partial.replace(self.file)
        print(name, row, file=sys.stderr, flush=True)


def rungs() -> dict[str, dict[str, Any]]:
    """The ladder's recipes, each with what came before."""
    fields: dict[str, Any] = {}
    found = {}
    for name, change in LADDER.items():
        fields = {**fields, **change}
        found[name] = fields
    return found


def rows(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Names and recipes, the cheap ones first: `precision | part | row | seed`."""
    parts: dict[str, dict[str, dict[str, Any]]] = {
        "ladder": {DYNAMIC: rungs()["+ first token constant"], **rungs()},  # so it leaves the rung its checkpoint
        "recipes": {name: {"recipe": name, **SAME_CALIBRATION} for name in RECIPES},
        "left out": LEFT_OUT,
        "choices": CHOICES,
        "as shipped": SHIPPED,
        "families": FAMILY_ROWS,
    }
    found: list[tuple[float, str, dict[str, Any]]] = [(0.0, "float32", {})]
    if "families" in arguments.parts:
        floats = {f"float32 | {model}": {"model": model} for model in FAMILIES}
        found += [(0.0, key, fields) for key, fields in floats.items() if wanted(key, arguments.only)]
    for part in arguments.parts:
        for precision in sorted(set(PARTS[part]) & set(arguments.precisions)):
            for name, fields in parts[part].items():
                seconds = training_seconds(row_recipe(fields))
                for seed in arguments.seeds if seconds and part == "recipes" else arguments.seeds[:1]:
                    key = f"{precision} | {part} | {name} | {seed}"
                    if wanted(key, arguments.only):
                        found.append((seconds, key, {**fields, "precision": precision, "seed": seed}))
    return [(key, fields) for _, key, fields in sorted(found, key=lambda row: row[0])]


def wanted(key: str, words: list[str] | None) -> bool:
    """Whether a row was asked for."""
    return not words or any(word in key for word in words)


def training_seconds(recipe: Recipe) -> float:
    """What the steps of a recipe take on two cores, roughly."""
    local, layers, whole = recipe.local.steps, recipe.block_wise.steps, recipe.end_to_end.steps
    return 1.3 * local + 9 * layers + 9 * whole + 5 * recipe.scales.steps


def original_of(fields: dict[str, Any]) -> Path:
    """The model that a row is about."""
    from converted_models import CONVERSIONS, convert
    from real_models import MODELS

    from fetch_smollm2 import fetch

    model = fields.get("model", "llama")
    if model in CONVERSIONS:
        return convert(model)
    return fetch(model=MODELS[model]) if model in MODELS else fetch()


def measure(name: str, fields: dict[str, Any], count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantizes (or finds the checkpoint) and compares with the original on both texts, `count` windows of each."""
    from fptquant.evaluation.comparison import compare
    from fptquant.evaluation.dynamic import use_dynamic_ranges
    from fptquant.evaluation.perplexity import evaluation_windows
    from fptquant.loading import load_model, open_source
    from fptquant.train.teacher import Teacher

    source = open_source(original_of(fields))
    row: dict[str, Any] = {"windows": count, "seconds": None, "memory": None, "commit": commit()}
    quantized = "precision" in fields
    row["recipe"] = row_recipe(fields).digest() if quantized else None
    path = source.path
    if quantized:
        path = checkpoint(source.path, fields, arguments.work)
        summary = json.loads((path / "fptquant" / "summary.json").read_text())
        row |= {"seconds": sum(summary["seconds"].values()), "memory": summary["peak_memory_bytes"]}
    model, original = load_model(open_source(path)), load_model(source)
    if DYNAMIC in name:
        use_dynamic_ranges(model)
    for text in TEXTS:
        file = ROOT / "tests" / "data" / f"{text}.test.txt"
        windows = evaluation_windows(source.tokenizer, file, count, 512)
        kept = "-".join(["teacher", text, *([fields["model"]] if "model" in fields else [])])
        teacher = Teacher(original, source.architecture, windows, arguments.work / kept)
        row[text] = asdict(compare(model, teacher, range(count)))
    if quantized and not arguments.keep and DYNAMIC not in name:
        for file in path.glob("*.safetensors"):
            file.unlink()
    return row


def commit() -> str:
    """The last that changed the package."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "offline"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def row_recipe(fields: dict[str, Any]) -> Recipe:
    """The recipe of a row, without its name."""
    rest = {name: value for name, value in fields.items() if name != "model"}
    recipe = Recipe.load(rest.pop("recipe")) if "recipe" in rest else Recipe.parse({})
    return recipe.changed("row", **rest, name="row", description="")


def checkpoint(source: Path, fields: dict[str, Any], work: Path) -> Path:
    """The checkpoint of a row, made if it isn't there, or is of another commit."""
    recipe = row_recipe(fields)
    digest = "-".join([*([fields["model"]] if "model" in fields else []), recipe.digest()])
    output, made_at, now = work / digest, work / f"{digest}.commit", commit()
    if not list(output.glob("*.safetensors")) or not made_at.is_file() or made_at.read_text() != now:
        file = work / f"{digest}.yaml"
        file.write_text(yaml.safe_dump(recipe.to_dict()))
        command: list[str | Path] = [Path(sys.executable).parent / "fptquant", "quantize", source, "-o", output]
        subprocess.run([*command, "--recipe", file, "--overwrite"], check=True)
        made_at.write_text(now)
    return output


if __name__ == "__main__":
    main()
