"""What an export says of itself: `fptquant-export.json` for programs, README.md for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fptquant.export.formats import FLOAT
from fptquant.export.quality import ExportQuality
from fptquant.format.schema import EXPORT_RECORD

_TEXT = """# {title}

Exported by {package} from `{checkpoint}`, {form}

```sh
vllm serve {title}    # on CPUs add --dtype {dtype}
```

{layers}

## What could not be kept

{losses}

## Quality

{quality}

The same, to be read by programs, is in `{record}`.
"""
_FORMS = {
    True: "in floating point, like any model that was never quantized.",
    False: "in the format of compressed-tensors: vLLM, and transformers\nwith the package `compressed-tensors`, need "
    "no `vllm-fptquant` to load it.",
}


@dataclass(frozen=True)
class ExportRecord:
    """What an export is."""

    format: str
    checkpoint: str  # name of its directory
    package: str
    layers: Mapping[str, int]  # kinds of quantized layers, and how many there are
    losses: tuple[str, ...]
    checkpoint_bytes: int
    export_bytes: int
    quality: ExportQuality | None

    def write(self, directory: Path, title: str) -> None:
        """Writes both files; `title` is the name that the directory will have."""
        (directory / EXPORT_RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        content = _TEXT.format(
            title=title,
            package=self.package,
            checkpoint=self.checkpoint,
            form=_FORMS[self.format == FLOAT],
            dtype=self.cpu_dtype(),
            layers="\n".join(f"- {count} layers: {kind}" for kind, count in self.layers.items()),
            losses="\n".join(f"- {loss}" for loss in self.losses),
            quality="Not measured." if self.quality is None else _table(self.quality),
            record=EXPORT_RECORD,
        )
        (directory / "README.md").write_text(content, encoding="utf-8")

    def cpu_dtype(self) -> str:
        """Argument of vLLM's --dtype that works on CPUs."""
        kinds = " ".join(self.layers)
        if "packed" in kinds:
            return "float16"  # in bfloat16, AMX quantizes inputs, and takes sizes that 128 divides only
        return "bfloat16 where they have AMX, float32 where not" if "by token" in kinds else "float32"


def _table(quality: ExportQuality) -> str:
    return f"""On {quality.windows} windows of {quality.length} tokens, simulated as stock vLLM computes it:

| | checkpoint | export |
|---|---|---|
| perplexity | {quality.checkpoint:.3f} | {quality.export:.3f} |
| KL divergence from the checkpoint, nats per token | | {quality.kl:.4f} |
| same most likely token | | {100 * quality.agreement:.1f} % |"""
