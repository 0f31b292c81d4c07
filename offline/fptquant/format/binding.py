"""Binds a checkpoint's tensors to its config.json and to each other.

One more tensor, `fptquant_binding`, holds the config.json that the tensors were written for, and a checksum of every
other tensor. It travels with them whatever loads them; both loaders compare it with what they are about to compute:

- the configuration in effect, after whatever a user overrides at start: every field that changes the result;
- each tensor's name, type, shape and bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.format.checks import require_finite
from fptquant.format.schema import CheckpointConfig

BINDING = "fptquant_binding"  # name of the tensor: uint8 (bytes,), JSON in UTF-8

# Fields of config.json that no logit depends on. Everything else is bound, fields of later versions too.
FREE = frozenset(
    {
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype",
        "torch_dtype", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp", "bos_token_id",
        "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states", "return_dict", "id2label",
        "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "task_specific_params",
        "quantization_config",
        "classifier_from_token", "method", "use_sep_token",  # what vLLM's classifiers make of the logits
    }
)  # fmt: skip
# RoPE of these types does not look at how many positions the model says it has.
_ANY_LENGTH = ("default", "linear", "llama3")
# What is said of a checkpoint in format version 1; its path is the argument.
UNBOUND = "%s: written by fptquant before its tensors were bound to config.json: quantize again to have that checked"
_REMEDY = "weights and config.json do not belong together: fetch the checkpoint again, or quantize again"


def bind(config: Mapping[str, Any], crc32: Mapping[str, int]) -> Tensor:
    """The tensor that binds others, of these checksums, to `config`, the content of config.json; uint8 (bytes,)."""
    config = dict(config)
    config["quantization_config"] = {**config["quantization_config"], "producer": {}}  # a record, of where as of how
    record = {"config": config, "crc32": dict(crc32)}
    return torch.frombuffer(bytearray(json.dumps(record, sort_keys=True).encode()), dtype=torch.uint8)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's dtype, shape and bytes."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Computes the `checksum` of each tensor, by its name."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Binding:
    """What the tensors of a checkpoint belong to."""

    config: dict[str, Any]
    crc32: dict[str, int]

    @classmethod
    def parse(cls, tensor: Tensor) -> Binding:
        """Reads what `bind` wrote.

        Raises:
            FPTQuantError: the tensor is damaged.
        """
        try:
            record = json.loads(bytes(tensor.cpu().numpy().tobytes()))
            return cls(dict(record["config"]), dict(record["crc32"]))
        except (ValueError, KeyError, TypeError):
            raise FPTQuantError(f"{BINDING} is damaged: fetch the checkpoint again, or quantize again") from None

    @classmethod
    def of_files(cls, files: Iterable[Path | str]) -> Binding | None:
        """The binding in one of these safetensors files, None without.

        Raises:
            FPTQuantError: a file is damaged.
        """
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    if BINDING in file.keys():  # noqa: SIM118 (no dict)
                        return cls.parse(file.get_tensor(BINDING))
            except (SafetensorError, OSError) as error:
                raise FPTQuantError(f"'{path}' is corrupt or truncated ({error}): fetch the checkpoint again") from None
        return None

    @classmethod
    def of_directory(cls, folder: Path) -> Binding | None:
        """The binding in a checkpoint directory, None without; as `of_files`."""
        return cls.of_files(sorted(folder.glob("*.safetensors")))

    def require_file(self, config: Mapping[str, Any]) -> None:
        """Refuses a config.json that is not the one that was written, before anything is made of its fields.

        Args:
            config: its content.

        Raises:
            FPTQuantError: names the first field that differs, and both values.
        """
        free = self._free(self.config.get("rope_parameters")) - {"quantization_config"}
        bound, found = (
            {name: value for name, value in content.items() if name not in free} for content in (self.config, config)
        )
        _require_equal(_flat(bound), _flat(found))

    def require_config(self, actual: Any, checkpoint: CheckpointConfig) -> None:
        """Refuses a configuration under which the tensors would compute something else.

        Args:
            actual: the `PretrainedConfig` in effect. What was bound is read by the same class, so that defaults and
                renamed fields of one transformers version are the same on both sides.
            checkpoint: the `quantization_config` in effect.

        Raises:
            FPTQuantError: names the first field that differs, and both values.
        """
        bound = _flat(CheckpointConfig.parse(self.config["quantization_config"]).to_dict(), "quantization_config.")
        found = _flat(checkpoint.to_dict(), "quantization_config.")
        expected = type(actual).from_dict({**self.config, "quantization_config": None})
        free = self._free(getattr(expected, "rope_parameters", None))
        for fields, config in ((bound, expected), (found, actual)):
            fields |= _flat({name: value for name, value in config.to_dict().items() if name not in free})
            if fields.get("sliding_window") == 0:  # a family's word for none, which vLLM replaces by its own
                del fields["sliding_window"]
        bound["model_type"] = self.config.get("model_type")
        _require_equal(bound, found)

    @staticmethod
    def _free(rope: Mapping[str, Any] | None) -> frozenset[str]:
        """Fields that no logit depends on, under this RoPE."""
        kinds = [of_type for of_type in (rope or {}).values() if isinstance(of_type, Mapping)] or [rope or {}]
        any_length = all(kind.get("rope_type", "default") in _ANY_LENGTH for kind in kinds)
        return FREE | ({"max_position_embeddings"} if any_length else set())

    def require_tensors(self, found: Mapping[str, int], *, all_of_them: bool = True) -> None:
        """Refuses tensors that are not those that were written.

        Args:
            found: checksum of each tensor by name, without the binding itself.
            all_of_them: whether none may be missing.

        Raises:
            FPTQuantError: names the first that is missing, added or altered.
        """
        for problem, names in (
            ("is missing from", self.crc32.keys() - found.keys() if all_of_them else ()),
            ("does not belong to", found.keys() - self.crc32.keys()),
            ("is not what was written into", {n for n, crc in found.items() if self.crc32.get(n, crc) != crc}),
        ):
            if names:
                raise FPTQuantError(
                    f"{min(names)} {problem} this checkpoint (so for {len(names)} of {len(self.crc32)} tensors): "
                    "it is damaged, fetch it again or quantize again"
                )


@dataclass
class Watch:
    """Sees the tensors of a checkpoint go by on their way into a model, and compares them.

    Attributes:
        binding: of the checkpoint; found among the tensors when it isn't known before.
        found: checksum of each tensor that went by.
        current: name of the last one, for an error while it was being placed.
    """

    binding: Binding | None = None
    found: dict[str, int] = field(default_factory=dict)
    current: str = ""

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes on all but the binding.

        Raises:
            FPTQuantError: a name comes twice, a tensor is not finite, or not what a binding that is known before says.
        """
        known = self.binding
        for self.current, tensor in weights:
            if self.current == BINDING:
                self.binding = Binding.parse(tensor)
                continue
            if self.current in self.found:
                raise FPTQuantError(f"{self.current} is in two of the checkpoint's files: delete the stale one")
            if tensor.is_floating_point() and not self.current.endswith("_scale"):  # its layer says more of a scale
                require_finite(self.current, tensor)
            self.found[self.current] = checksum(tensor)
            if known is not None:
                known.require_tensors({self.current: self.found[self.current]}, all_of_them=False)
            yield self.current, tensor

    def require_bound(self, config: Any, checkpoint: CheckpointConfig, *, all_of_them: bool = True) -> bool:
        """Compares what went by with its binding: `Binding.require_tensors` and `Binding.require_config`.

        Args:
            config: the `PretrainedConfig` in effect.
            checkpoint: the `quantization_config` in effect.
            all_of_them: whether the whole checkpoint went by, so that nothing may be missing.

        Returns:
            Whether there was a binding. Format version 1 had none.

        Raises:
            FPTQuantError: something differs, or the binding is missing.
        """
        if self.binding is None:
            if all_of_them and checkpoint.format_version > 1:
                raise FPTQuantError(f"{BINDING} is missing from this checkpoint: fetch it again or quantize again")
            return False
        self.binding.require_config(config, checkpoint)
        self.binding.require_tensors(self.found, all_of_them=all_of_them)
        return True


def _require_equal(bound: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in sorted(bound.keys() | found.keys()):
        ours, theirs = bound.get(name), found.get(name)
        same = ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)
        if not same and not name.startswith("quantization_config.producer."):
            raise FPTQuantError(f"config.json: {name} is {theirs!r}, but the weights were made for {ours!r}: {_REMEDY}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the names; nulls are left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat
