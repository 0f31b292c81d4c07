"""The page and the plots of what results.py measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

TEXTS = ("wiki", "moby")
# One model of each family that there is: what it is.
FAMILIES = {
    "llama": "SmolLM2-135M-Instruct, real, a dequantized GGUF",
    "qwen2": "Qwen2.5-Coder-0.5B-Instruct, real, a dequantized GGUF",
    "qwen3": "SmolLM2 given norms of queries and keys, and distilled from itself",
    "mixtral": "SmolLM2 given four experts for each MLP, and distilled from itself",
    "gemma3": "Gemma-3-270M, real, a dequantized GGUF",
}
FAMILY_PRECISIONS = ("w4a8kv8", "w4a8", "w4a4kv4")
# Rows of one table by name; several where a row was run with several seeds.
Table = dict[str, list[dict[str, Any]]]

INTRODUCTION = """# Results

    make results

Methods, recipes and parts of them against each other, in one pipeline. Other windows are other numbers: compare
perplexities within this page only.

SmolLM2-135M-Instruct (a dequantized GGUF), simulated in float32 (what vLLM serves equals the simulation:
[verify](verify.md)). {windows} windows of 512 tokens, no special tokens; calibration and training on the shipped text
only. Ranges are static and per tensor except where a row says dynamic; embedding in float32, head at 7-bit weights
and 8-bit activations. "Left out" and "choices" train a third of the steps of `fptquant`, except where a row names
another recipe. Rows calibrate on the same 16 sequences, but those "as shipped" on 64, `fptquant-best` on 128. KL: of
the original's next-token distribution from the model's, nats per token. Agreement: share of tokens with the same
most likely successor. Several seeds: each figure. Time and peak memory of `fptquant quantize` are as they came: two
virtual cores of several machines, mostly beside other jobs, some with AVX-512 ([log](log.md)), a run that was stopped
and continued from its continuation on; they tell minutes from hours, and methods apart only where they differ much.
`fptquant-light` as shipped at w4a4kv4 ran alone. A row that is missing was not measured yet. The
rows of `fptquant` recipes are from before T_k started from keys (`T_k: {start: keys}`), before stage 1 saw layers in
turns, before weights made up for earlier layers and before 4-bit inputs and keys were shifted, and were not measured
again: on the windows of [accuracy](accuracy.md), `fptquant` at w4a4kv4 went from 33.60 to 31.73 by all of it. Of
"families", "scales trained" is from behind the first two, `fptquant-light` is as shipped, on 64 sequences. **Rows of
`rtn`, `gptq`, `quantease`, "nearest, min-max" and "+ L_p ranges" are worse than the methods are**: gains of norms were
folded into their weights without need. `rtn` and `gptq` at w4a4kv4 were measured again; at w4a8kv8, on 10 windows of
`wiki`, they go from 459.7 to 103.8 and from 51.4 to 41.3. Rows that are named after papers are our implementations of
what those papers describe ([methods](methods.md)), not their authors' programs.
"""


def write_page(rows: dict[str, dict[str, Any]], windows: int, order: Sequence[str], folder: Path) -> str:
    """Writes `results.md`, its plots, and `results.json` with all figures.

    Args:
        rows: `precision | part | row | seed` to what was measured, and "float32".
        windows: how many of each text.
        order: of the rows in a table.
        folder: to write to.

    Returns:
        The page.
    """
    lines = INTRODUCTION.replace("{windows}", str(windows)).splitlines()  # it has braces of YAML
    commits = sorted({row["commit"] for row in rows.values() if "commit" in row})
    lines += ["", f"Commits: {', '.join(commits)}."] if commits else []
    reference = rows.get("float32")
    if reference:
        lines += [
            "",
            "float32: wiki {:.2f}, moby {:.2f}.".format(*(reference[t]["perplexity"] for t in TEXTS)),
        ]
    lines += families_table(rows)
    for (precision, part), table in tables(rows, order).items():
        lines += ["", f"## {precision}, {part}", "", "| | wiki | moby | KL wiki | agreement | minutes | GB |"]
        lines.append("|---|---|---|---|---|---|---|")
        lines += [table_row(name, measured) for name, measured in table.items()]
        if reference and len(table) > 1:
            plot = f"results-{precision}-{part.replace(' ', '-')}.svg"
            lines += ["", f"![{precision}, {part}]({plot})"]
            plot_table(table, reference, f"{precision}, {part}", folder / plot)
    page = "\n".join(lines) + "\n"
    (folder / "results.md").write_text(page, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return page


def tables(rows: dict[str, dict[str, Any]], order: Sequence[str]) -> dict[tuple[str, str], Table]:
    """Rows by precision and part, each table in the order given."""
    found: dict[tuple[str, str], Table] = {}
    known = [key for key in rows if not key.startswith("float32") and key.split(" | ")[2] in order]
    known = [key for key in known if key.split(" | ")[1] != "families"]
    for key in sorted(known, key=lambda key: (order.index(key.split(" | ")[2]), key)):
        precision, part, name, _ = key.split(" | ")
        found.setdefault((precision, part), {}).setdefault(name, []).append(rows[key])
    return dict(sorted(found.items(), reverse=True))


def families_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of the section on families: a row for each model and recipe, a column for each precision."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in rows.items():
        precision, part, name, *_ = [*key.split(" | "), "", ""]
        if part == "families":
            found.setdefault(name, {})[precision] = row
    if not found:
        return []
    windows = next(iter(next(iter(found.values())).values()))["windows"]
    what = f"Perplexity on {windows} windows of `wiki`, its ratio to float32's, and minutes and GB that it took."
    lines = ["", "## Families", "", what, ""]
    lines += [f"- {model}: {what}." for model, what in FAMILIES.items()]
    lines += ["", f"| | float32 | {' | '.join(FAMILY_PRECISIONS)} |", f"|---|---|{'---|' * len(FAMILY_PRECISIONS)}"]
    for name in sorted(found, key=lambda name: list(FAMILIES).index(name.split(":")[0])):
        reference = rows[f"float32 | {name.split(':')[0]}"]["wiki"]["perplexity"]
        measured = found[name]
        cells = [family_cell(measured[key], reference) if key in measured else "" for key in FAMILY_PRECISIONS]
        lines.append(f"| {' | '.join([name, f'{reference:.2f}', *cells])} |")
    return lines


def family_cell(row: dict[str, Any], reference: float) -> str:
    """Perplexity, its ratio, minutes and GB."""
    perplexity = row["wiki"]["perplexity"]
    cost = f"{row['seconds'] / 60:.0f} min, {row['memory'] / 1e9:.1f} GB"
    return f"{perplexity:.2f} (**{perplexity / reference:.3f}x**), {cost}"


def table_row(name: str, measured: list[dict[str, Any]]) -> str:
    """One line of a table; several seeds are separated by slashes."""

    def cell(values: list[float], digits: int) -> str:
        return " / ".join(f"{value:.{digits if value < 1000 else 0}f}" for value in values)

    cells = [
        name,
        cell([row["wiki"]["perplexity"] for row in measured], 2),
        cell([row["moby"]["perplexity"] for row in measured], 2),
        cell([row["wiki"]["kl"] for row in measured], 3),
        cell([100 * row["wiki"]["agreement"] for row in measured], 1),
        cell([row["seconds"] / 60 for row in measured], 1),
        cell([row["memory"] / 1e9 for row in measured], 1),
    ]
    return f"| {' | '.join(cells)} |"


def plot_table(table: Table, reference: dict[str, Any], title: str, file: Path) -> None:
    """Perplexity of each row on both texts (logarithmic), a dot for each seed, and lines for the original."""
    figure = Figure(figsize=(7, 0.3 * len(table) + 1.2), layout="constrained")
    axes = figure.subplots()
    for text, color in zip(TEXTS, ("tab:blue", "tab:orange"), strict=True):
        dots = [(row[text]["perplexity"], place) for place, found in enumerate(table.values()) for row in found]
        axes.scatter(*zip(*dots, strict=True), color=color, label=text, zorder=2)
        axes.axvline(reference[text]["perplexity"], color=color, linestyle=":", label=f"{text}, float32")
    axes.set_xscale("log")
    axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_xlabel("perplexity")
    axes.set_title(title)
    axes.legend(fontsize="small")
    # the same figures make the same bytes
    with rc_context({"svg.hashsalt": "results", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
