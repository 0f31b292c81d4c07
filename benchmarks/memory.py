"""Memory, time and disk of `fptquant quantize` against the depth and the width of random models.

    python benchmarks/memory.py --shapes 4x512 8x512 16x512 8x256 8x1024 --recipes rtn gptq fptquant
    python benchmarks/memory.py --shapes 1b 1b-deep --recipes rtn gptq -- --residency streamed

Options behind `--` go to `fptquant quantize`. Rows are written to `--work` as they come and aren't measured again, so
this can be stopped at any time; rows that failed are. Each row is a process of its own, which reads a model that isn't
in the page cache. Peak: the largest resident size, pages of mapped files included. Anonymous: without those, which the
system may drop; what has to fit into memory is between the two.
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

from fptquant.recipe import Recipe
from memory_page import plot, stage_table, table
from random_model import shape_of, write
from watch import forget, watch

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("rtn", "gptq", "fptquant-light", "fptquant")
STEPS = 2  # of each stage that trains


def main() -> None:
    """Measures what is missing, prints the tables, writes them, JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "memory", help="models and results")
    parser.add_argument("--shapes", nargs="+", required=True, help="named ones, or LAYERSxHIDDEN (random_model.py)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["rtn", "gptq", "fptquant"])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--label", help="names the rows of this run (default: the options behind --, or 'default')")
    parser.add_argument("--stop-above", type=float, default=16.0, help="GB of anonymous memory that end a run")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--report", action="store_true", help="print what was measured, measure nothing")
    parser.add_argument("options", nargs="*", help="of `fptquant quantize`, behind --")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "memory.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    if not arguments.report:
        for name in arguments.shapes:
            for recipe in arguments.recipes:
                key = f"{name} | {recipe} | {arguments.sequences} x {arguments.length} | {label(arguments)}"
                if rows.get(key, {}).get("status") != 0:
                    rows[key] = measure(name, recipe, arguments)
                    file.write_text(json.dumps(rows, indent=1) + "\n")
                    print(key, rows[key], file=sys.stderr, flush=True)
    page = f"{table(rows)}\n\n{stage_table(rows)}\n"
    (arguments.work / "memory.md").write_text(page, encoding="utf-8")
    plot(rows, arguments.work / "memory.svg")
    print(page)


def label(arguments: argparse.Namespace) -> str:
    """What tells the rows of this run from others of the same shape and recipe."""
    return arguments.label or " ".join(arguments.options) or "default"


def measure(name: str, recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own; the model is written first where it isn't there."""
    shape = shape_of(name)
    source, output = arguments.work / "models" / name, arguments.work / "checkpoint"
    write(source, shape)
    forget(source)
    shutil.rmtree(output, ignore_errors=True)
    log = arguments.work / f"{name}-{recipe}.log"
    command = [sys.executable, "-m", "fptquant.cli", "quantize", source, "-o", output, "--fresh"]
    command += ["--recipe", recipe_file(recipe, arguments)]
    command += ["--sequences", str(arguments.sequences), "--length", str(arguments.length), *arguments.options]
    code, threads = commit(), str(arguments.threads)
    usage = watch(command, log, {"OMP_NUM_THREADS": threads, "COLUMNS": "120"}, int(arguments.stop_above * 1e9))
    row = asdict(usage) | {
        "layers": shape.layers,
        "hidden": shape.hidden,
        "parameters": shape.parameters,
        "source": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "threads": arguments.threads,
        "commit": code,
    }
    if usage.status == 0:
        summary = json.loads((output / "fptquant" / "summary.json").read_text())
        row |= {"stages": summary["seconds"], "peaks": summary["peak_bytes"], "output": summary["output_bytes"]}
    else:
        row["last_line"] = last_words(log)
    if arguments.keep and usage.status == 0:
        kept = arguments.work / f"{name}-{recipe}-{'-'.join(label(arguments).split())}"
        shutil.rmtree(kept, ignore_errors=True)
        output.rename(kept)
    for left in (
        output,
        *arguments.work.glob(f".{output.name}.*"),
    ):  # a killed run leaves its state and half a checkpoint
        shutil.rmtree(left, ignore_errors=True)
    return row


def last_words(log: Path) -> str:
    """The last line of a log that has words in it, without the frame around them."""
    lines = [line.strip(" │|") for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if any(letter.isalpha() for letter in line)), "")


def recipe_file(name: str, arguments: argparse.Namespace) -> Path:
    """A shipped recipe with `STEPS` steps in each of its stages that trains, on as much text as calibrates."""
    recipe = Recipe.load(name)
    stages = ("local", "end_to_end", "scales")
    changes: dict[str, Any] = {stage: {"steps": STEPS} for stage in stages if getattr(recipe, stage).steps}
    changes["training"] = {"sequences": arguments.sequences, "length": arguments.length}
    file: Path = arguments.work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe.changed("memory.py", **changes).to_dict()))
    return file


def commit() -> str:
    """The last that changed the package."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "offline"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
