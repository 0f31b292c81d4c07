"""Metrics of the training stages as a file and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fptquant.run.training import BLOCK_WISE, CODES, END_TO_END, LOCAL, SCALES

# what the command calls the stages
NAMES = {
    LOCAL: "train transforms on weights",
    BLOCK_WISE: "train transforms layer by layer",
    END_TO_END: "train transforms end to end",
    CODES: "calibrate and round",
    SCALES: "train scales and ranges",
}


def write_metrics(rows: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Writes `metrics.jsonl` and `loss.png`; nothing when nothing was trained."""
    if not rows:
        return
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
    plot_losses(rows, directory / "loss.png")


def plot_losses(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One panel a stage: the loss of each step, and its running mean."""
    from matplotlib.figure import Figure  # no global state, no display
    from matplotlib.ticker import MaxNLocator

    stages: list[str] = list(dict.fromkeys(str(row["stage"]) for row in rows))
    figure = Figure(figsize=(5 * len(stages), 3.5), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        losses = [float(row["loss"]) for row in rows if row["stage"] == stage]
        steps = [int(row["step"]) for row in rows if row["stage"] == stage]
        axes.plot(steps, losses, alpha=0.4, label="of each step")
        axes.plot(steps, running_mean(losses), label="running mean")
        axes.set(title=NAMES.get(stage, stage), xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    figure.savefig(file)


def running_mean(losses: Sequence[float]) -> list[float]:
    """Exponential mean, a tenth of each new loss, starting with the first."""
    mean, means = losses[0], []
    for loss in losses:
        mean += 0.1 * (loss - mean)
        means.append(mean)
    return means
