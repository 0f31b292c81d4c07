"""Writing an export: complete or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fptquant
from fptquant.errors import FPTQuantError
from fptquant.export.formats import COMPRESSED_TENSORS, require_format
from fptquant.export.hf_config import stock_config
from fptquant.export.plan import Online, Plan, make_plan
from fptquant.export.quality import measure_export
from fptquant.export.record import ExportRecord
from fptquant.export.tensors import stock_tensors
from fptquant.files import read_json
from fptquant.format import CheckpointConfig
from fptquant.format.binding import Binding, Watch
from fptquant.loading import Source
from fptquant.progress import Stages
from fptquant.run.publication import Publication
from fptquant.run.shards import ShardWriter
from fptquant.run.writer import copy_companions, make_readable
from fptquant.weight_files import DTYPES, WeightFiles

# What only our cache and our first token have.
_OWN = (
    "k_scale", "v_scale", "k_zero_point", "v_zero_point", "k_shift", "k_sink", "v_sink", "sink_steady", "sink_output",
)  # fmt: skip


@dataclass(frozen=True)
class Exporter:
    """A checked export, of which nothing is written yet."""

    source: Source
    plan: Plan
    publication: Publication

    def run(self, windows: Tensor | None, stages: Stages) -> ExportRecord:
        """Writes and publishes it.

        Args:
            windows: (windows, length) tokens to compare it with the checkpoint on; None where that isn't measured.
            stages: shows progress.

        Raises:
            FPTQuantError: the checkpoint is damaged, or the disk full.
        """
        source, quality = self.source, None
        with self.publication as staging:
            with stages.stage("write"):
                self._write(staging, stages)
            if windows is not None:
                with stages.stage("measure quality", "lower --quality"):
                    quality = measure_export(source, staging, self.plan, windows, stages)
            record = ExportRecord(
                format=self.plan.format,
                checkpoint=source.path.resolve().name,
                package=f"vllm-fptquant {fptquant.__version__}",
                layers=self.plan.kinds(),
                losses=self.plan.losses,
                checkpoint_bytes=source.weights.size,
                export_bytes=WeightFiles.of(staging).size,
                quality=quality,
            )
            record.write(staging, self.publication.target.name)
        return record

    def _write(self, directory: Path, stages: Stages) -> None:
        source, shards = self.source, ShardWriter(directory)
        for name, tensor in stages.track(_tensors(source, self.plan), len(source.weights.tensors)):
            shards.add(name, tensor)
        shards.finish()
        config = stock_config(read_json(source.path / "config.json"), self.plan, source.architecture)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(source.path, directory)
        make_readable(directory)


def prepare(
    source: Source,
    output: Path,
    *,
    format: str = COMPRESSED_TENSORS,
    online: Online = "undo",
    overwrite: bool = False,
) -> Exporter:
    """Checks everything and writes nothing.

    Args:
        source: a checkpoint in our format.
        output: directory of the export.
        format: of the export.
        online: see `make_plan`.
        overwrite: replace an earlier export, or checkpoint.

    Raises:
        FPTQuantError: it can't be exported, or the output not be written.
    """
    architecture = source.architecture
    require_format(format, online=online)
    if architecture.fused:
        raise FPTQuantError(
            f"export: {architecture.class_name} has projections that are one weight elsewhere, and aren't exported: "
            "serve the checkpoint with the plugin"
        )
    config = CheckpointConfig.parse(source.config.quantization_config)
    plan = make_plan(config, architecture, architecture.shape(source.config).layers, format=format, online=online)
    for name, layer in plan.layers.items():
        if layer.block is not None and f"{name}.bias" in source.weights:
            raise FPTQuantError(
                f"export: {name} has a bias, beside which stock vLLM has no online Hadamard: leave --online keep out"
            )
    publication = Publication(output, overwrite=overwrite)
    publication.require_alone()
    publication.require_apart(source.path, "the checkpoint")
    publication.require_space(_expected_bytes(source, plan))
    return Exporter(source, plan, publication)


def _tensors(source: Source, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """What stock vLLM loads, a layer at a time; what is read is compared with the checkpoint's binding."""
    stored, config = source.weights, CheckpointConfig.parse(source.config.quantization_config)
    watch = Watch(Binding.of_files(stored.files))
    layers: dict[str, list[str]] = {}
    others: list[str] = []
    for name in stored.tensors:
        owner = name.rpartition(".")[0]
        (layers.setdefault(owner, []) if owner in plan.layers else others).append(name)
    for owner, names in layers.items():
        found = {name.removeprefix(f"{owner}."): tensor for name, tensor in watch(stored.read(names))}
        for name, tensor in stock_tensors(plan.layers[owner], found, _float_type(source)).items():
            yield f"{owner}.{name}", tensor
    for name, tensor in watch(stored.read(others)):
        if name.rpartition(".")[2] not in _OWN:
            yield name, tensor
    watch.require_bound(source.config, config)


def _float_type(source: Source) -> torch.dtype:
    """Of the checkpoint's embedding, and whatever else it keeps in floating point."""
    return DTYPES[source.weights.tensors[f"{source.architecture.embedding}.weight"].dtype]


def _expected_bytes(source: Source, plan: Plan) -> int:
    """About the size of the export's weight files."""
    tensors = source.weights.tensors
    found = source.weights.size
    for name, layer in plan.layers.items():
        packed = math.prod(tensors[f"{name}.weight_packed"].shape) * 4
        weights = packed // 4 * (32 // layer.scheme.weights.bits)
        size = _float_type(source).itemsize * 8 if layer.bits == 16 else layer.bits
        found += weights * size // 8 - packed
    return found
