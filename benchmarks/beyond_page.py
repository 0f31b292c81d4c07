"""The page of what beyond_perplexity.py measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TEXTS = ("wiki", "moby")
FLOAT = "float32"  # name of the original's rows
LENGTH, LONG = 512, 4096  # tokens of windows
BUCKETS = ((0, 512), (512, 2048), (2048, LONG))  # positions; calibration sees the first
Rows = dict[str, dict[str, Any]]  # by `figure | model`

INTRODUCTION = """# Beyond perplexity

    python benchmarks/beyond_perplexity.py ORIGINAL NAME=OUT ...

What quantizing costs in answers, in the whole distribution, on long texts and in what a model writes: the original in
float32 beside its checkpoints. Nothing is fetched: tasks, windows and prompts are made of `tests/data/wiki.test.txt`
and `moby.test.txt` ([results](results.md) has the perplexities of methods and recipes). Every figure is of the first so
many items, and an item is the same for every model. ± is the standard error of one figure by itself: models are asked
the same, so that their differences are known better than that. By itself the command takes 500 items of each task, 20
windows of 512 and 4 of 4096 tokens of each text and 100 prompts; sections say how many were run, a figure that is
missing was not measured yet, and `--published` goes on from this page's figures.
"""
TASKS = """`endings`: which of four endings of 6 words follows a passage of 40, by likelihood; the other three are from
elsewhere in the same text, so chance is 0.25. `last_word`: the next word of a passage that has it already, asked as
LAMBADA asks for last words: accuracy is the share of passages where the most likely tokens are that word, perplexity
that of the word. Passages don't overlap; half are from each text. Scored by lm-eval ({backend})."""
GENERATION = """Greedy answers of {new_tokens} tokens at most to {prompts} requests to summarize a passage of 40 words
in one sentence, as vLLM serves them. *Stopped*: the answer ended by itself. *Loops*: its last tokens are a phrase of
two tokens or more, three times in a row (Holtzman et al. 2020). *seq-rep-4*: share of its 4-grams that were there
before, mean over answers (Welleck et al. 2020)."""
LONG_TEXTS = """Perplexity on windows of 4096 tokens ({windows} of each text), as they are, as vLLM serves them, by
position in the window; in brackets the ratio to the original's. Calibration sees positions below 512 only, so ranges of
keys and values behind that are those of shorter texts."""
KL = """Windows of 512 tokens ({windows} of each text), as they are, simulated. KL divergence: of the original's
next-token distribution from the model's, nats per token. Agreement: share of tokens with the same most likely
successor."""


def write_page(rows: Rows, folder: Path) -> str:
    """Writes `beyond-perplexity.md` and, with all figures, `beyond-perplexity.json`.

    Args:
        rows: `figure | model` to what was measured.
        folder: to write to.

    Returns:
        The page.
    """
    figures: dict[str, Rows] = {}
    for key, row in rows.items():
        figure, name = key.split(" | ")
        figures.setdefault(figure, {})[name] = row
    sections = [INTRODUCTION.rstrip()]
    asked: dict[str, Rows] = {task: figures[task] for task in ("endings", "last_word") if task in figures}
    if asked:
        sections += ["## Tasks", tasks(asked)]
    for title, section, figure in (
        ("KL divergence and agreement", kl, "kl"),
        ("Long texts", long, "long"),
        ("Generated text", generation, "generation"),
    ):
        if figure in figures:
            sections += [f"## {title}", section(figures[figure])]
    sections += ["## Models", *models(rows)]
    page = "\n\n".join(sections) + "\n"
    (folder / "beyond-perplexity.md").write_text(page, encoding="utf-8")
    (folder / "beyond-perplexity.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return page


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def same(rows: Rows, setting: str) -> str:
    """What all rows have of a setting; where they differ, each with its model."""
    values = {name: str(row[setting]) for name, row in rows.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return " / ".join(f"{value} ({name})" for name, value in values.items())


def rate(value: float, count: int) -> str:
    """A share of `count` items and its standard error."""
    return f"{value:.3f} ± {math.sqrt(value * (1 - value) / count):.3f}"


def tasks(asked: dict[str, Rows]) -> str:
    """What lm-eval found: a row for each model, a column for each metric of each task."""
    columns: dict[str, dict[str, str]] = {}
    for task, rows in asked.items():
        for name, row in rows.items():
            for score in sorted(row["scores"], key=lambda score: str(score["metric"])):
                column = f"{task}, {score['metric']} ({same(rows, 'items')} items)"
                columns.setdefault(column, {})[name] = score_cell(score)
    names = dict.fromkeys(name for rows in asked.values() for name in rows)
    lines = [[name, *(cells.get(name, "-") for cells in columns.values())] for name in names]
    backends = {row["backend"] for rows in asked.values() for row in rows.values()}
    return f"{TASKS.format(backend=' and '.join(sorted(backends)))}\n\n{table(['', *columns], lines)}"


def score_cell(score: dict[str, Any]) -> str:
    """A value and its standard error."""
    digits = 3 if score["metric"] == "acc" else 2
    return f"{score['value']:.{digits}f}" + ("" if score["error"] is None else f" ± {score['error']:.{digits}f}")


def kl(rows: Rows) -> str:
    """Perplexity, KL divergence and agreement of each text."""
    head = ["", *(f"{what}, {text}" for what in ("perplexity", "KL", "agreement") for text in TEXTS)]
    lines = [
        [
            name,
            *(f"{row[text]['perplexity']:.2f}" for text in TEXTS),
            *(f"{abs(row[text]['kl']):.3f}" for text in TEXTS),
            *(f"{100 * row[text]['agreement']:.1f} %" for text in TEXTS),
        ]
        for name, row in rows.items()
    ]
    return f"{KL.format(windows=same(rows, 'windows'))}\n\n{table(head, lines)}"


def long(rows: Rows) -> str:
    """Perplexity by position, of each text and model."""
    head = ["", *(f"{first} to {end - 1}" for first, end in BUCKETS), "all"]
    lines = []
    for text in TEXTS:
        reference = perplexities(rows[FLOAT][text]) if FLOAT in rows else None
        for name, row in rows.items():
            found = perplexities(row[text])
            cells = [f"{value:.2f}" for value in found]
            if reference is not None and name != FLOAT:
                cells = [f"{c} ({v / r:.3f}x)" for c, v, r in zip(cells, found, reference, strict=True)]
            lines.append([f"{text}, {name}", *cells])
    return f"{LONG_TEXTS.format(windows=same(rows, 'windows'))}\n\n{table(head, lines)}"


def perplexities(parts: Sequence[dict[str, float]]) -> list[float]:
    """Of each range of positions, and of all tokens."""
    total = sum(part["tokens"] * part["loss"] for part in parts) / sum(part["tokens"] for part in parts)
    return [math.exp(loss) for loss in (*(part["loss"] for part in parts), total)]


def generation(rows: Rows) -> str:
    """How answers end and repeat themselves."""
    lines = [
        [
            name,
            rate(row["stopped"], row["prompts"]),
            rate(row["loops"], row["prompts"]),
            f"{row['seq_rep']:.3f}",
            f"{row['tokens']:.1f}",
        ]
        for name, row in rows.items()
    ]
    text = GENERATION.format(new_tokens=same(rows, "new_tokens"), prompts=same(rows, "prompts"))
    return f"{text}\n\n{table(['', 'stopped', 'loops', 'seq-rep-4', 'mean tokens'], lines)}"


def models(rows: Rows) -> list[str]:
    """How each model was made, and the commits that measured."""
    made = {key.split(" | ")[1]: row["made by"] for key, row in rows.items()}
    lines = [f"- {name}: " + ("the original." if by is None else f"`{by}`") for name, by in made.items()]
    return ["\n".join(lines), f"Measured by commits {', '.join(sorted({row['commit'] for row in rows.values()}))}."]
