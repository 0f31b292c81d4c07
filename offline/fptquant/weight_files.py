"""Which file of a model directory holds which tensor: decided once, for everything that reads weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.files import first_line, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {  # safetensors' names of the types that weights, codes and scales have
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.IGNORECASE)


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, "BF16"
    name: str = ""  # in the file, where it is another one there
    start: int | None = None  # of the rows of that tensor that these are; None for all of it


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a model directory, each with the one file it is read from."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def of(cls, directory: Path) -> WeightFiles:
        """Takes `model.safetensors`, or the shards that the index names, and reads the headers of those files.

        That also proves that none is truncated. Whatever else lies there is no part of the model. Where two readers
        could take different files or tensors for the model, it is refused.

        Raises:
            FPTQuantError: no safetensors, a damaged or missing file, or files that contradict each other.
        """
        if not (directory / INDEX).is_file():
            return cls(directory, _read_header(_single_file(directory)))
        placed = _weight_map(directory / INDEX)
        names = sorted(set(placed.values()))
        if (directory / SINGLE).is_file() and names != [SINGLE]:
            raise FPTQuantError(
                f"'{directory}' has both {SINGLE} and an index that names other files: remove {SINGLE}, or {INDEX}, "
                "whichever isn't the model"
            )
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            if not (directory / name).is_file():
                raise FPTQuantError(f"'{directory / name}' is missing, but {INDEX} names it: fetch the model again")
            found = _read_header(directory / name)
            _check_placed(directory / name, found, placed)
            tensors.update(found)
        return cls(directory, tensors)

    @classmethod
    def of_files(cls, directory: Path, files: Iterable[Path]) -> WeightFiles:
        """Takes the files that a loader has chosen.

        Raises:
            FPTQuantError: a damaged file, or a tensor in two of them.
        """
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            found = _read_header(file)
            for name in found.keys() & tensors.keys():
                raise FPTQuantError(f"{name} is in '{file}' and in '{tensors[name].file.name}': delete the stale file")
            tensors.update(found)
        return cls(directory, tensors)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is stored."""
        return name in self.tensors

    @property
    def files(self) -> list[Path]:
        """The files, sorted by name."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def size(self) -> int:
        """Of the tensors, in bytes."""
        return sum(math.prod(tensor.shape) * _itemsize(tensor.dtype) for tensor in self.tensors.values())

    def split(self, placed: Mapping[str, list[tuple[str, int]]]) -> WeightFiles:
        """The same files, with tensors that are some rows of stored ones in place of these.

        Args:
            placed: by the name of a stored tensor, names and numbers of rows of what it holds, in order.

        Raises:
            FPTQuantError: a tensor isn't stored, or has another number of rows.
        """
        found = dict(self.tensors)
        for fused, parts in placed.items():
            if fused not in found:
                raise FPTQuantError(f"'{self.directory}' lacks the tensor {fused}: fetch the model again")
            whole, start = found.pop(fused), 0
            expected = sum(rows for _, rows in parts)
            if whole.shape[0] != expected:
                raise FPTQuantError(
                    f"'{self.directory}': {fused} has {whole.shape[0]} rows, but config.json asks for {expected}: "
                    "weights and config.json do not belong together"
                )
            for name, rows in parts:
                stored = whole.name or fused
                found[name] = replace(whole, shape=(rows, *whole.shape[1:]), name=stored, start=start)
                start += rows
        return WeightFiles(self.directory, found)

    def renamed(self, names: Mapping[str, str]) -> WeightFiles:
        """Some of the tensors, by other names.

        Args:
            names: by the name of a stored tensor that is wanted, its new one.

        Raises:
            FPTQuantError: two get the same.
        """
        found: dict[str, StoredTensor] = {}
        for stored, name in names.items():
            tensor = self.tensors[stored]
            if name in found:
                raise FPTQuantError(
                    f"'{self.directory}' holds both {found[name].name} and {stored}, for one weight: remove one"
                )
            found[name] = replace(tensor, name=tensor.name or stored)
        return WeightFiles(self.directory, found)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and content of every tensor, mapped from its file: a tensor that isn't looked at takes no memory."""
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for name, tensor in self.tensors.items():
                    if tensor.file == file:
                        yield name, _content(opened, name, tensor)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and content of some tensors, each copied when it is asked for, so that no file stays mapped.

        Raises:
            FPTQuantError: a file has gone, or isn't what it was.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.tensors[name].file, []).append(name)
        for file, here in wanted.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in here:
                        tensor = _content(opened, name, self.tensors[name])
                        if tuple(tensor.shape) != self.tensors[name].shape:
                            raise FPTQuantError(f"'{file}' was changed while it was in use: start again")
                        yield name, tensor.clone()
            except (SafetensorError, OSError) as error:
                raise FPTQuantError(
                    f"'{file}' can't be read any more ({first_line(error)}): put it back, and run again to continue"
                ) from None

    def require_alone(self) -> None:
        """Refuses other safetensors files beside these.

        Raises:
            FPTQuantError: names the first.
        """
        others = sorted(set(self.directory.glob("*.safetensors")) - set(self.files))
        if others:
            raise FPTQuantError(
                f"'{others[0]}' is no part of the checkpoint beside it, but vLLM may load it: remove it"
            )


def _itemsize(dtype: str) -> int:
    """Bytes of a value, of a type as safetensors names it; of types that aren't ours, one."""
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


def _content(opened: Any, name: str, stored: StoredTensor) -> Tensor:
    """A tensor of an open file, or the rows of one."""
    if stored.start is None:
        whole: Tensor = opened.get_tensor(stored.name or name)
        return whole
    rows: Tensor = opened.get_slice(stored.name)[stored.start : stored.start + stored.shape[0]]
    return rows


def _single_file(directory: Path) -> Path:
    shards = sorted(file.name for file in directory.iterdir() if _SHARD.fullmatch(file.name))
    if not (directory / SINGLE).is_file():
        if shards:
            raise FPTQuantError(f"'{directory}' has {shards[0]}, but no {INDEX}: fetch the model again")
        raise FPTQuantError(f"'{directory}' has no {SINGLE} (other formats aren't read: convert it to safetensors)")
    if shards:
        raise FPTQuantError(
            f"'{directory}' has both {SINGLE} and {shards[0]}, and no {INDEX} that tells which is the model: "
            "remove the others"
        )
    return directory / SINGLE


def _weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name; every file lies beside the index.

    Raises:
        FPTQuantError: not an index, or one that names a file elsewhere.
    """
    placed = read_json(index, unique=True).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise FPTQuantError(f"'{index}' has no weight_map from tensors to files: fetch the model again")
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise FPTQuantError(f"'{index}' names '{name}', which is no safetensors file beside it: mend the index")
    folded: dict[str, str] = {}
    for name in names:
        if name.casefold() in folded:
            raise FPTQuantError(
                f"'{index}' names both {folded[name.casefold()]} and {name}, one file on some disks: mend the index"
            )
        folded[name.casefold()] = name
    return placed


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
            return {name: StoredTensor(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        if file.exists() and not os.access(file, os.R_OK):  # safetensors calls that "no such file"
            raise FPTQuantError(f"'{file}' can't be read by this user: change its permissions") from None
        raise FPTQuantError(f"'{file}' is corrupt or truncated ({first_line(error)}): fetch the model again") from None


def _check_placed(file: Path, found: Mapping[str, StoredTensor], placed: Mapping[str, str]) -> None:
    """Compares what a shard holds with what the index says of it: transformers and vLLM load all that is in a shard.

    Raises:
        FPTQuantError: names the first tensor that differs.
    """
    for name in found:
        if name not in placed:
            raise FPTQuantError(f"'{file}' holds {name}, which {INDEX} does not name: fetch the model again")
        if placed[name] != file.name:
            raise FPTQuantError(f"'{file}' holds {name}, which {INDEX} places in {placed[name]}: fetch the model again")
    for name, place in placed.items():
        if place == file.name and name not in found:
            raise FPTQuantError(f"'{file}' lacks the tensor {name} that {INDEX} places there: fetch the model again")
