"""Weight files in Hugging Face layout, written tensor by tensor: never more than one file's in memory."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fptquant.weight_files import INDEX, SINGLE

LARGEST = 1_000_000_000  # bytes of a file, unless it holds a single tensor


class ShardWriter:
    """Collects tensors, and writes a file whenever the next one would make it too large."""

    def __init__(self, directory: Path) -> None:
        """Starts without a file; tensors are collected until a file of `directory` is full."""
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []  # names of the tensors in each file

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; it must not change until its file is written, which `add` or `finish` does."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._size + size > LARGEST:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._size += size
        self._total += size

    def finish(self) -> None:
        """Writes the last file and, where there are several, the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._partial(0).rename(self._directory / SINGLE)
            return
        placed: dict[str, str] = {}
        for shard, names in enumerate(self._shards):
            file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
            self._partial(shard).rename(self._directory / file)
            placed |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._pending, self._partial(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._size = {}, 0

    def _partial(self, shard: int) -> Path:
        return self._directory / f"shard-{shard}.partial"
