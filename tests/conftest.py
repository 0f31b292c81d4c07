"""Tiny random models and a tiny tokenizer, made here: no test needs a network or a real model."""

import gc
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fptquant.format.binding import BINDING, bind, checksums

Model = TypeVar("Model", bound=PreTrainedModel)

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests" / "data" / "wiki.test.txt"
EXCERPT = TEXT.with_name("wiki.excerpt.txt")  # its start; a tokenizer takes a second for all of it
VOCABULARY = 320
NO_OP_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""

# No size but GQA's is a power of two; head_dim 10 is not hidden / heads either.
MODELS: dict[str, dict[str, object]] = {
    "gqa": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mha": {"hidden_size": 36, "intermediate_size": 56, "num_attention_heads": 3, "num_key_value_heads": 3},
    "mqa": {
        "hidden_size": 28,
        "intermediate_size": 44,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 10,
    },
    "bias": {
        "hidden_size": 42,
        "intermediate_size": 72,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "tied": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def build_model(kind: str, seed: int = 0, embedding_rms: float = 0.02, **changes: object) -> LlamaForCausalLM:
    """A random Llama in float32 whose every parameter matters: gains and biases too, which start trivial."""
    fields = {
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    }
    config = LlamaConfig(**{**fields, **MODELS[kind], **changes})
    config.architectures = ["LlamaForCausalLM"]
    embedding = 1.0 if config.tie_word_embeddings else embedding_rms
    return randomized(LlamaForCausalLM(config), seed, gain=0.3, bias=0.2, embedding=embedding)


def randomized(model: Model, seed: int, *, gain: float, bias: float, embedding: float) -> Model:
    """Gives a model random parameters: gains of mean 1, and the deviations of gains, biases and embedding."""
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + gain * noise)
        elif name.endswith("bias"):
            parameter.copy_(bias * noise)
        elif "embed" in name:
            parameter.copy_(noise * embedding)
        else:
            parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


@cache
def build_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, shared; with `bos` it puts `<s>` in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.read_text(encoding="utf-8")[:20_000]], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, each takes whole files, and one all that use the recipe on the real model, run once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = nodeid.startswith("tests/e2e/") and "unscaled_checkpoint" not in nodeid
            return "e2e" if shared else str(super()._split_scope(nodeid))

    return ByFile(config, log)


def pytest_sessionstart() -> None:
    """Takes interrupts again where a shell started the tests in the background: tests interrupt their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Lets extensions that check for leaks at exit see everything gone."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keeps the suite on one core, and its float sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Takes what imports left out of garbage collection, or each stage of a run spends a second on it.

    For each module, as many imports are made only when they are needed.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[Callable[..., None]]:
    """Every run makes its figures, which is quick; to draw them takes as long as all the rest, and is for `drawn`.

    Yields:
        What draws.
    """
    with pytest.MonkeyPatch.context() as patch:
        draw = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).touch())
        yield draw


@pytest.fixture
def drawn(undrawn: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn."""
    monkeypatch.setattr(Figure, "savefig", undrawn)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(bos=False)


@pytest.fixture(scope="session")
def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    return build_tokenizer(bos=True)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """`make_model(kind, **config changes)`: a fresh random model in memory."""
    return build_model


@pytest.fixture(scope="session")
def save_model(tokenizer: PreTrainedTokenizerFast, tokenizer_with_bos: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """`save_model(directory, kind, dtype=..., bos=..., **config changes)`: a complete checkpoint directory."""

    def save(
        directory: Path,
        kind: str = "bias",
        dtype: torch.dtype = torch.float32,
        bos: bool = True,
        **changes: object,
    ) -> Path:
        model = build_model(kind, **changes).to(dtype)  # type: ignore[arg-type]
        model.config.dtype = dtype
        model.save_pretrained(directory)
        (tokenizer_with_bos if bos else tokenizer).save_pretrained(directory)
        (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
        return directory

    return save


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Path:
    """A model with biases, GQA and a BOS; shared, so read only."""
    return save_model(tmp_path_factory.mktemp("models") / "bias")


@pytest.fixture(scope="session")
def text_file() -> Path:
    """Real English text."""
    return EXCERPT


@pytest.fixture(scope="session")
def cuda_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets torch's CPU build index fake CUDA tensors, which it refuses for want of a way to switch devices."""
    from torch.utils.cpp_extension import include_paths, library_paths

    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(NO_OP_GUARD)
    include = [f"-I{path}" for path in include_paths()]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "guard.cpp", "-o", "guard.so", *include]
    subprocess.run([*command, *(f"-L{path}" for path in library_paths()), "-lc10"], cwd=folder, check=True)
    torch.ops.load_library(folder / "guard.so")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def edit_json(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(changes)
    path.write_text(json.dumps(data), encoding="utf-8")


def bound(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Altered tensors of a checkpoint, as if they had been its own from the start."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    others = {name: tensor for name, tensor in tensors.items() if name != BINDING}
    return {**others, BINDING: bind(config, checksums(others))}


@pytest.fixture(scope="session")
def change_json() -> Callable[..., None]:
    """`change_json(path, **fields)` replaces top-level fields of a JSON file."""
    return edit_json


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that asks a hub for something fails at once instead of waiting for the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    yield


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """VLLM's engine in this process, which has imported it; and nothing of it left.

    VLLM freezes, unfreezes and collects the heap for each engine: most of a tiny one's time. Only imports are frozen.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from tests.vllm_fptquant.serve_tokens import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # a worker replaces it
    for module in ("vllm.v1.engine.core", "vllm.v1.worker.gpu_worker"):
        monkeypatch.setattr(f"{module}.freeze_gc_heap", lambda: None)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    gc.collect()
    gc.freeze()
    yield
    cleanup_dist_env_and_memory()
