"""The model card: README.md of a checkpoint, for people and for the hub."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import fptquant
from fptquant.files import portable
from fptquant.format.schema import EXTRAS
from fptquant.report.quality import Quality
from fptquant.run.job import Job

_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")  # of the hub's cache
_OF_SOURCE = ("license", "license_name", "license_link", "language", "pipeline_tag")
_TAGS = ["fptquant", "vllm", "quantized", "int4"]
_PAPER = "https://arxiv.org/abs/2506.04985"
_TEXT = """# {title}

{what}, quantized with `vllm-fptquant` {version} to static integers: all scales are fixed in advance. vLLM and
transformers need that package to load it. The method is [FPTQuant]({paper})'s; the recipe says what of it was used.

| | |
|---|---|
{facts}

## Use

```sh
vllm serve {here} --quantization fptquant    # on CPUs add --dtype float32
fptquant serve {here}                        # the same, with what the machine needs
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}")  # the exact simulation of what vLLM serves
tokenizer = AutoTokenizer.from_pretrained("{here}")
```

```sh
# in a checkout of vllm-fptquant; --profile gpu on a GPU
MODEL=/path/to/{here} docker compose -f docker/compose.yaml --profile cpu up --build
```

## Quality

{quality}

## How it was made

```sh
{command}
```

{made}
"""


def provenance(job: Job, command: Sequence[str]) -> dict[str, str]:
    """Where a checkpoint comes from: source, revision and command line, without this machine's directories.

    Args:
        job: what was done.
        command: arguments of `fptquant`; none where it was something else that did it.
    """
    path = job.source.path.resolve()
    found: dict[str, str] = {"source": path.name}
    snapshot = _SNAPSHOT.search(path.as_posix())
    if snapshot:
        found = {"source": f"{snapshot['org']}/{snapshot['name']}", "revision": snapshot["revision"]}
        found["base_model"] = found["source"]
    if command:
        found["command"] = shlex.join(["fptquant", *map(portable, command)])
    packages = ("torch", "transformers", "safetensors")
    found["versions"] = ", ".join(
        [f"vllm-fptquant {fptquant.__version__}", *(f"{name} {version(name)}" for name in packages)]
        + [f"Python {platform.python_version()}"]
    )
    return found


def write_card(
    job: Job, directory: Path, name: str, quality: Quality | None, origin: dict[str, str], warning: str = ""
) -> None:
    """Writes README.md.

    Args:
        job: what was done.
        directory: of the checkpoint, with everything else in it.
        name: that it will have.
        quality: if it was measured.
        origin: see `provenance`.
        warning: what speaks against using it.
    """
    data = _card_data(job.source.path, directory, origin)
    precision = _precision(job)
    source = origin["source"]
    made = [f"Recipe `{job.recipe.name}` ([all settings]({EXTRAS}/recipe.yaml)), seed {job.recipe.seed}, on "
            f"{job.windows.shape[0]} sequences of {job.windows.shape[1]} tokens; source `{source}`"
            + (f" at revision `{origin['revision']}`" if "revision" in origin else "")
            + f" (fingerprint {job.source.fingerprint()}). {origin['versions']}."]  # fmt: skip
    if (directory / EXTRAS / "ranges.png").exists():
        made.append(
            "What the quantizers see, layer by layer, before and after the transforms, and where the ranges end "
            f"([figures]({EXTRAS}/ranges.json)):\n\n![ranges]({EXTRAS}/ranges.png)"
        )
    facts = {
        "original": f"[{source}](https://huggingface.co/{source})" if "base_model" in origin else source,
        "architecture": job.source.kind,
        "precision": precision,
        "head": _head(job),
        "recipe": f"{job.recipe.name}: {job.recipe.description}".rstrip(": "),
        "transforms": ", ".join(job.transforms.names) or "none",
        "first token": "constant keys and values" if job.config.sink else "like any other",
        "kept in": str(job.dtype).removeprefix("torch."),
    }
    content = _TEXT.format(
        title=f"{source.rpartition('/')[2]}, {precision}",
        what=f"[{source}](https://huggingface.co/{source})" if "base_model" in origin else f"`{source}`",
        paper=_PAPER,
        version=fptquant.__version__,
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        here=name,
        quality=(f"**Warning: {warning}.**\n\n" if warning else "") + _quality(quality),
        command=origin.get("command", "fptquant quantize ..."),
        made="\n\n".join(made),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}").save(directory / "README.md")


def _card_data(source: Path, directory: Path, origin: dict[str, str]) -> ModelCardData:
    """The card's metadata, with licence, languages and tags of the source's."""
    described = _metadata(source)
    fields: dict[str, Any] = {key: described[key] for key in _OF_SOURCE if described.get(key)}
    if "license" not in fields and any(directory.glob("LICENSE*")):
        link = sorted(file.name for file in directory.glob("LICENSE*"))[0]
        fields |= {"license": "other", "license_name": "the-originals", "license_link": link}
    tags = [tag for tag in described.get("tags") or [] if isinstance(tag, str)]
    fields["tags"] = list(dict.fromkeys([*tags, *_TAGS]))
    fields.setdefault("pipeline_tag", "text-generation")
    if "base_model" in origin:
        fields |= {"base_model": origin["base_model"], "base_model_relation": "quantized"}
    return ModelCardData(library_name="transformers", **fields)


def _metadata(source: Path) -> dict[str, Any]:
    """What the source's README.md says in front; nothing where there is none, or none that can be read."""
    file = source / "README.md"
    if not file.is_file():
        return {}
    try:
        return dict(ModelCard.load(file, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # someone else's file, and no reason to fail
        return {}


def _precision(job: Job) -> str:
    config = job.config
    found = f"w{config.weights.bits}a{config.activations.bits}"
    if config.kv_cache.bits < 16:
        found += f"kv{config.kv_cache.bits}"
    return found + (f"-g{config.weights.group_size}" if config.weights.group_size else "")


def _head(job: Job) -> str:
    scheme = job.config.scheme_for(job.source.architecture.head)
    if scheme is None:
        return "not quantized" + (", the embedding's weight" if job.tied else "")
    return f"INT{scheme.weights.bits} weights, INT{scheme.activations.bits} inputs"


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return "Not measured when it was written: `fptquant evaluate` does."
    return f"""On {quality.windows} windows of {quality.length} tokens of calibration text that nothing was fitted to:

| | original | quantized |
|---|---|---|
| perplexity | {quality.original:.3f} | {quality.quantized:.3f} |
| KL divergence from the original, nats per token | | {quality.kl:.4f} |
| same most likely token | | {100 * quality.agreement:.1f} % |

Figures on so little text say whether something went wrong, not how two methods compare."""
