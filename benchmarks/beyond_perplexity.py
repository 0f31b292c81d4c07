"""What quantizing costs beside perplexity: answers, distributions, long texts, generated text; float beside quantized.

    python benchmarks/beyond_perplexity.py ORIGINAL NAME=CHECKPOINT ...

Nothing is fetched: tasks, texts and prompts are made of tests/data. Every figure is on the first so many items, is kept
in `--work` as soon as it is there, and isn't measured again for the same model and items, so this can be stopped at any
time. Tasks, long texts and generation are asked of vLLM, as served (`--backend transformers` takes the simulation for
tasks); KL divergence and agreement are of the simulation. Writes docs/beyond-perplexity.md, and its figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from beyond_page import BUCKETS, FLOAT, LENGTH, LONG, TEXTS, write_page
from endings import DATA, last_words, passages, write
from generation import generate, prompts, summary
from results import ROOT, Results, commit

from fptquant.errors import FPTQuantError
from fptquant.evaluation.comparison import compare
from fptquant.evaluation.perplexity import evaluation_windows
from fptquant.evaluation.tasks import Tasks
from fptquant.evaluation.vllm_backend import VLLMEngine, require_vllm
from fptquant.files import require_model
from fptquant.loading import load_model, open_source
from fptquant.train.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor

    from fptquant.loading import Source

TASKS = {"last_word": last_words, "endings": passages}
BATCH = 64  # sequences generated together


def main() -> None:
    """Measures what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT", help="the name is what the page shows")
    parser.add_argument("--items", type=int, default=500, help="of each task")
    parser.add_argument("--windows", type=int, default=20, help=f"of {LENGTH} tokens of each text, for KL divergence")
    parser.add_argument("--long-windows", type=int, default=4, help=f"of {LONG} tokens of each text")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64, help="generated for a prompt at most")
    parser.add_argument("--backend", choices=("vllm", "transformers"), default="vllm", help="of tasks")
    parser.add_argument("--figures", nargs="*", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "beyond-perplexity")
    parser.add_argument("--page", type=Path, default=ROOT / "docs", help="directory of the page")
    parser.add_argument("--published", action="store_true", help="where nothing was measured, go on from docs/")
    arguments = parser.parse_args()
    models = named_models(arguments)
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.published and not (arguments.work / "results.json").exists():
        shutil.copy(ROOT / "docs" / "beyond-perplexity.json", arguments.work / "results.json")
    results = Results(arguments.work / "results.json")
    try:
        original = checked(models[FLOAT], arguments)
        for name, path in models.items():
            model = Measured(open_source(path), original, arguments)
            for figure in arguments.figures:
                key, settings = f"{figure} | {name}", model.settings(figure)
                row = results.rows.get(key, {})
                if any(row.get(setting) != value for setting, value in settings.items()):
                    row = {**settings, **FIGURES[figure](model), "commit": commit(), "made by": made_by(path)}
                    results.add(key, row)
            model.close()
    except FPTQuantError as error:
        raise SystemExit(f"error: {error}") from None
    print(write_page(results.rows, arguments.page))


def named_models(arguments: argparse.Namespace) -> dict[str, Path]:
    """Paths by name, the original first.

    Raises:
        SystemExit: a name is missing or there twice.
    """
    found = {FLOAT: arguments.original}
    for argument in arguments.checkpoints:
        name, separator, path = argument.partition("=")
        if not (name and separator and path):
            raise SystemExit(f"error: '{argument}': give NAME=CHECKPOINT")
        if name in found:
            raise SystemExit(f"error: '{name}' names two models")
        found[name] = Path(path)
    return found


def checked(original: Path, arguments: argparse.Namespace) -> Source:
    """The original, after everything that can be wrong before the first figure has been looked at.

    Raises:
        FPTQuantError: no such model, too many windows, or what measures isn't installed.
    """
    for path in named_models(arguments).values():
        require_model(str(path))
    asked = set(arguments.figures)
    if asked & {"long", "generation"} or (arguments.backend == "vllm" and asked & set(TASKS)):
        require_vllm()
    source = open_source(original)
    if "long" in asked:
        source.require_length("--figures long", LONG, generated=1)
    for figure, length, count in (("kl", LENGTH, arguments.windows), ("long", LONG, arguments.long_windows)):
        for text in TEXTS if figure in asked else ():
            evaluation_windows(source.tokenizer, DATA / f"{text}.test.txt", count, length)
    if asked & {*TASKS, "generation"}:
        for make in TASKS.values():
            make(max(arguments.items, arguments.prompts), TEXTS)
    return source


def made_by(path: Path) -> str | None:
    """The command that made a checkpoint; None for models that aren't ours."""
    with suppress(OSError):
        return str(json.loads((path / "fptquant" / "summary.json").read_text())["provenance"]["command"])
    return None


class Measured:
    """One model, and how its figures are measured."""

    def __init__(self, source: Source, original: Source, arguments: argparse.Namespace) -> None:
        """Args: the model and the original, which may be the same."""
        self.source, self.original, self.arguments = source, original, arguments

    def settings(self, figure: str) -> dict[str, Any]:
        """What a figure depends on: it is measured again where one differs."""
        chosen = self.arguments
        items: dict[str, dict[str, Any]] = {
            **{task: {"items": chosen.items, "backend": chosen.backend} for task in TASKS},
            "generation": {"prompts": chosen.prompts, "new_tokens": chosen.new_tokens},
            "long": {"windows": chosen.long_windows},
            "kl": {"windows": chosen.windows, "original": self.original.fingerprint()},
        }
        return {"model": self.fingerprint, **items[figure]}

    @cached_property
    def fingerprint(self) -> str:
        """By which the model is known again."""
        return self.source.fingerprint()

    @cached_property
    def engine(self) -> VLLMEngine:
        """Serves the model, from the first figure on that asks it."""
        return VLLMEngine(self.source.path, LONG + 1, max_num_seqs=BATCH)

    def close(self) -> None:
        """Ends the engine's processes."""
        if "engine" in vars(self):
            self.engine.close()

    def task(self, task: str) -> dict[str, Any]:
        """What lm-eval says of a task of endings.py."""
        folder = self.arguments.work / f"{task}-{self.arguments.items}"
        write(folder, TASKS[task](self.arguments.items, TEXTS), task)
        scores = Tasks([task], folder).run(self.source, vllm=self.arguments.backend == "vllm")
        return {"scores": [asdict(score) for score in scores]}

    def generation(self) -> dict[str, Any]:
        """How greedy continuations end and repeat themselves, and the continuations."""
        asked = prompts(self.source.tokenizer, self.arguments.prompts)
        found = generate(self.engine, asked, self.arguments.new_tokens)
        text = [self.source.tokenizer.decode(one.tokens) for one in found]
        file = self.arguments.work / f"generated-{self.fingerprint}.json"
        file.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        return summary(found)

    def long(self) -> dict[str, Any]:
        """Mean negative log likelihood of each text by position in windows of `LONG` tokens."""
        return {
            text: by_position(self._windows(text, LONG, self.arguments.long_windows), self.engine.score)
            for text in TEXTS
        }

    def kl(self) -> dict[str, Any]:
        """Perplexity, KL divergence from the original and agreement on each text."""
        model, teacher_model = load_model(self.source), load_model(self.original)
        found: dict[str, Any] = {}
        for text in TEXTS:
            windows = self._windows(text, LENGTH, self.arguments.windows)
            cache = self.arguments.work / f"teacher-{text}-{self.original.fingerprint()}"
            teacher = Teacher(teacher_model, self.original.architecture, windows, cache)
            found[text] = asdict(compare(model, teacher, range(len(windows))))
        return found

    def _windows(self, text: str, length: int, count: int) -> Tensor:
        return evaluation_windows(self.original.tokenizer, DATA / f"{text}.test.txt", count, length)


def by_position(windows: Tensor, score: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
    """For each range of positions how many tokens were predicted there and their mean negative log likelihood.

    Args:
        windows: (windows, length) tokens.
        score: see `perplexity.Scorer`.
    """
    losses = -torch.stack([score(window) for window in windows]).double()  # (windows, length - 1), of positions from 1
    parts = [losses[:, max(first, 1) - 1 : end - 1] for first, end in BUCKETS]
    return [{"tokens": part.numel(), "loss": float(part.mean())} for part in parts]


FIGURES: dict[str, Callable[[Measured], dict[str, Any]]] = {
    **{task: partial(Measured.task, task=task) for task in TASKS},
    "kl": Measured.kl,
    "generation": Measured.generation,
    "long": Measured.long,
}


if __name__ == "__main__":
    main()
