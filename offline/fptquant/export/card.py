"""README.md of an export: what it is, how it is served, and what it lost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import fptquant
from fptquant.export.quality import ExportQuality
from fptquant.format.schema import EXPORT_RECORD

_TEXT = """# {title}

Exported by `vllm-fptquant` {version} from `{checkpoint}`, in the format of compressed-tensors: vLLM, and transformers
with the package `compressed-tensors`, load it without `vllm-fptquant`.

```sh
vllm serve {title}    # on CPUs add --dtype float32{or_bfloat16}
```

{layers}

## What could not be kept

{losses}

## Quality

{quality}

The same, to be read by programs, is in `{record}`.
"""


def write_card(
    directory: Path,
    title: str,
    checkpoint: str,
    layers: Iterable[tuple[str, int]],
    losses: Iterable[str],
    quality: ExportQuality | None,
) -> None:
    """Writes README.md.

    Args:
        directory: of the export.
        title: its name.
        checkpoint: name of what it was made of.
        layers: kinds of quantized layers, and how many there are.
        losses: sentences.
        quality: if it was measured.
    """
    counts = dict(layers)
    packed = any("packed" in kind for kind in counts)
    content = _TEXT.format(
        title=title,
        version=fptquant.__version__,
        checkpoint=checkpoint,
        or_bfloat16=", for packed weights --dtype bfloat16" if packed else "",
        layers="\n".join(f"- {count} layers: {kind}" for kind, count in counts.items()),
        losses="\n".join(f"- {loss}" for loss in losses),
        quality="Not measured." if quality is None else _table(quality),
        record=EXPORT_RECORD,
    )
    (directory / "README.md").write_text(content, encoding="utf-8")


def _table(quality: ExportQuality) -> str:
    return f"""On {quality.windows} windows of {quality.length} tokens, simulated as stock vLLM computes it:

| | checkpoint | export |
|---|---|---|
| perplexity | {quality.checkpoint:.3f} | {quality.export:.3f} |
| KL divergence from the checkpoint, nats per token | | {quality.kl:.4f} |
| same most likely token | | {100 * quality.agreement:.1f} % |"""
