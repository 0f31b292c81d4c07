"""Tasks of the evaluation harness lm-eval, on the simulation in transformers or through vLLM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptquant.errors import FPTQuantError, is_out_of_memory
from fptquant.evaluation.task_names import require_named, unknown_task
from fptquant.evaluation.vllm_backend import engine_settings
from fptquant.files import first_line

if TYPE_CHECKING:
    from fptquant.loading import Source

LONGEST = 4096  # tokens of a context and its answer, where the model takes more
_NO_METRICS = {"alias", "name", "sample_len", "sample_count"}


@dataclass(frozen=True)
class Score:
    """What one metric of a task found."""

    task: str
    metric: str  # lm-eval's name; behind a comma that of a filter other than none
    value: float
    error: float | None  # its standard error, where there is one
    samples: int | None


def require_tasks(names: Sequence[str], include_path: Path | None = None) -> None:
    """What can be wrong with a choice of tasks as far as it is seen without importing lm-eval; takes no second.

    Raises:
        FPTQuantError: no such directory, lm-eval is not installed, or a name that no task file mentions.
    """
    if include_path is not None and not include_path.is_dir():
        raise FPTQuantError(f"--include-path: '{include_path}' is not a directory")
    harness = find_spec("lm_eval")
    if harness is None:
        raise FPTQuantError("--tasks: lm-eval is not installed: pip install 'vllm-fptquant[eval]'")
    own = [Path(place) / "tasks" for place in harness.submodule_search_locations or ()]
    require_named(names, own if include_path is None else [include_path, *own])


class Tasks:
    """A choice of tasks, found before any model is loaded."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        """Args: names of tasks or groups, as lm-eval has them; include_path is a directory with further task files.

        Raises:
            FPTQuantError: lm-eval is not installed, or a task is not known.
        """
        require_tasks(names, include_path)
        from lm_eval.tasks import TaskManager

        self.names = list(names)
        folder = None if include_path is None else str(include_path)
        if folder is not None:  # lm-eval's own files are thousands, and take seconds to look through
            self._manager = TaskManager(include_path=folder, include_defaults=False)
        if folder is None or not all(self._manager.match_tasks([name]) for name in names):
            self._manager = TaskManager(include_path=folder)
        for name in names:
            if not self._manager.match_tasks([name]):
                raise unknown_task(name, self._manager.all_tasks)

    def run(
        self, source: Source, *, vllm: bool = False, limit: int | None = None, shots: int | None = None
    ) -> list[Score]:
        """Scores of one model; each sample by itself, as the batch it is in must not change it.

        Args:
            source: the model.
            vllm: through vLLM, as served; else in transformers, a checkpoint of ours as its simulation.
            limit: samples of each task, the first ones.
            shots: examples in front of each sample; None for what the task says.

        Raises:
            FPTQuantError: a task can't be run, for want of its data most often.
        """
        from lm_eval import simple_evaluate

        # Standard errors by resampling: forks of a process that has computed with several threads may wait for ever.
        os.environ["DISABLE_MULTIPROC"] = "1"
        model = _served(source) if vllm else _simulated(source)
        try:
            found = simple_evaluate(
                model,
                tasks=self.names,
                task_manager=self._manager,
                limit=limit,
                num_fewshot=shots,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except Exception as error:  # task files, data sets and the network have kinds of their own
            if is_out_of_memory(error) or isinstance(error, FPTQuantError):
                raise
            raise FPTQuantError(f"--tasks: {', '.join(self.names)} can't be run: {first_line(error)}") from None
        finally:
            if vllm:
                model.model.llm_engine.engine_core.shutdown()  # this process would wait for it
        return scores(found)


def scores(found: dict[str, Any]) -> list[Score]:
    """What `lm_eval.simple_evaluate` returned, a row a metric; of groups, their own."""
    rows = []
    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            name, _, taken = key.partition(",")
            if key in _NO_METRICS or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{name}_stderr,{taken}")
            error = float(error) if isinstance(error, (int, float)) else None
            rows.append(Score(task, name if taken in ("", "none") else key, float(value), error, samples))
    return rows


def _length(source: Source) -> int:
    return min(LONGEST, int(source.config.max_position_embeddings))


def _simulated(source: Source) -> Any:
    from lm_eval.models.huggingface import HFLM

    from fptquant.loading import load_model

    model = load_model(source)
    return HFLM(
        pretrained=model, backend="causal", tokenizer=source.tokenizer, batch_size=1, max_length=_length(source)
    )


def _served(source: Source) -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    with engine_settings() as settings:
        return VLLM(pretrained=str(source.path), max_model_len=_length(source), batch_size="auto", **settings)
