"""How far an export is from the checkpoint that it was made of, on text that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.export.plan import Plan
from fptquant.export.simulation import stock_simulation
from fptquant.format import CheckpointConfig
from fptquant.format.schema import EXTRAS
from fptquant.loading import Source, load_model, open_source
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.report.compare import compare_logits, held_back, logits_side_by_side
from fptquant.report.quality import quality_line


@dataclass(frozen=True)
class ExportQuality:
    """Means over all predicted tokens; perplexities are their exponentials."""

    windows: int
    length: int
    checkpoint: float  # perplexity
    export: float  # perplexity
    kl: float  # KL(checkpoint | export), nats per token
    agreement: float  # share of tokens with the same most likely successor

    def line(self) -> str:
        """To be read."""
        on = f"checkpoint and export, {self.windows} windows of {self.length} tokens"
        return quality_line(self.checkpoint, self.export, self.kl, self.agreement, on)


def left_over(source: Source, windows: int) -> Tensor:
    """(up to windows, length) tokens of its calibration text that a checkpoint's run did not draw.

    Raises:
        FPTQuantError: the record of the run is gone, or doesn't tell where its text is, or nothing is left of it.
    """
    recipe = Recipe.load(str(source.path / EXTRAS / "recipe.yaml"))
    if recipe.calibration.source != "builtin":
        raise FPTQuantError(f"only the name of its calibration text is known here, '{recipe.calibration.source}'")
    sink = CheckpointConfig.parse(source.config.quantization_config).sink
    found = held_back(source, recipe, sink, windows)
    if not len(found):
        raise FPTQuantError("calibration and training took all of its text")
    return found


@torch.no_grad()
def measure_export(source: Source, directory: Path, plan: Plan, windows: Tensor, stages: Stages) -> ExportQuality:
    """Compares a checkpoint with its export, as stock vLLM computes it; both a layer at a time.

    Args:
        source: the checkpoint.
        directory: of the export.
        plan: of the export.
        windows: (windows, length) tokens.
        stages: shows progress.
    """
    track = partial(stages.track, total=2 * source.architecture.shape(source.config).layers)
    exported = open_source(directory, device=source.device)
    ours = load_model(source, residency="streamed")
    stock = stock_simulation(exported, plan, residency="streamed")
    models = ((ours, source.architecture), (stock, exported.architecture))
    perplexity, found = compare_logits(logits_side_by_side(models, windows, track))
    return ExportQuality(len(windows), windows.shape[1], perplexity, found.perplexity, found.kl, found.agreement)
