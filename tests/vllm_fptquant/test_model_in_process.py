"""The model class in one process: pipeline stages, and the graph that torch.compile makes of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype

from fptquant.errors import FPTQuantError
from tests.conftest import bound
from tests.vllm_fptquant.loaders import attend
from tests.vllm_fptquant.serving import TRANSFORMS, quantized
from vllm_fptquant.models.decoder import FPTQuantForCausalLM

TOKEN, OTHER = 0, 7  # BOS, which has constants, and another

# A sequence that starts with the token, one that doesn't, and one that goes on.
TOKENS = torch.tensor([TOKEN, 5, OTHER, TOKEN, 9])
POSITIONS = torch.tensor([0, 1, 0, 1, 40])

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(autouse=True)
def no_collection_in_a_trace() -> Iterator[None]:
    """Collects models before and after a test only: `__del__` of vLLM's CPU product reads a tensor, which in the middle
    of a trace fails and leaves torch's dispatcher as the trace had it, for every test that follows in the process."""
    gc.collect()
    gc.freeze()  # what the first tests imported
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.fixture(scope="module", params=[True, False], ids=["S_n", "no S_n"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("stages"), transforms=TRANSFORMS + ["S_n"] * request.param)


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[VllmConfig]:
    """Of the checkpoint, in a world of one process; the parameter is the type that the model runs in."""
    dtype = getattr(request, "param", "float32")
    config = EngineArgs(str(checkpoint), dtype=dtype, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/world", 0, "gloo")
        parallel_state.initialize_model_parallel()
        yield config
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


class Stage:
    """One stage of a pipeline, built and loaded as vLLM does."""

    def __init__(
        self,
        rank: int,
        size: int,
        checkpoint: Path,
        config: VllmConfig,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        first, last = rank == 0, rank == size - 1
        self.group = SimpleNamespace(rank_in_group=rank, world_size=size, is_first_rank=first, is_last_rank=last)
        self.config = config
        config.compilation_config.static_forward_context.clear()
        with self.active(), set_default_torch_dtype(config.model_config.dtype):
            self.model = FPTQuantForCausalLM(vllm_config=config)
            if tensors is not None:
                self.model.binding = None  # not those of the directory
            self.model.load_weights((tensors or load_file(checkpoint / "model.safetensors")).items())
            process_weights_after_loading(self.model, config.model_config, torch.device("cpu"))

    @contextmanager
    def active(self) -> Iterator[None]:
        """This process is the stage's."""
        with pytest.MonkeyPatch.context() as patch:
            for module in ("vllm.distributed.parallel_state", "vllm.model_executor.models.llama"):
                patch.setattr(f"{module}.get_pp_group", lambda: self.group)
            yield

    def __call__(self, tokens: Tensor | None, positions: Tensor, received: IntermediateTensors | None) -> Any:
        with self.active(), set_forward_context(None, self.config), torch.inference_mode():
            return self.model(tokens, positions, received)


@pytest.fixture
def stage(checkpoint: Path, config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Stage]:
    """`stage(rank, size)`; there is no KV cache, so attention sees its own token only."""

    monkeypatch.setattr(Attention, "forward", attend)
    return lambda rank, size: Stage(rank, size, checkpoint, config)


def test_later_stage_needs_no_token_ids(stage: Callable[[int, int], Stage]) -> None:
    whole, first, second = stage(0, 1), stage(0, 2), stage(1, 2)
    passed = first(TOKENS, POSITIONS, None)
    assert torch.equal(second(None, POSITIONS, passed), whole(TOKENS, POSITIONS, None))
    assert passed["sink_at_token"].flatten().tolist() == [1, 0, 0, 0, 0]

    constant = second.model.model.norm.sink_output
    assert torch.equal(second(None, POSITIONS, passed)[0], constant)
    altered = IntermediateTensors({**passed.tensors, "sink_at_token": torch.zeros(5, 1)})
    assert not torch.equal(second(None, POSITIONS, altered)[0], constant)


def test_decoding_passes_on_that_there_is_no_first_token(stage: Callable[[int, int], Stage]) -> None:
    whole, first, second = stage(0, 1), stage(0, 2), stage(1, 2)
    tokens, positions = torch.tensor([TOKEN, OTHER]), torch.tensor([3, 4])
    passed = first(tokens, positions, None)
    assert not passed["sink_at_token"].any()
    assert torch.equal(second(None, positions, passed), whole(tokens, positions, None))


def test_buffers_between_stages_have_what_is_passed(stage: Callable[[int, int], Stage]) -> None:
    """vLLM copies what it receives into these."""
    first = stage(0, 2)
    passed = first(torch.tensor([TOKEN, 5, 6]), torch.arange(3), None)
    empty = first.model.make_empty_intermediate_tensors(3, torch.float32, torch.device("cpu"))
    assert passed.tensors.keys() == empty.tensors.keys()
    assert all(passed[name].shape == empty[name].shape for name in empty.tensors)
    assert all(passed[name].dtype == empty[name].dtype for name in empty.tensors)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.input_layernorm", "model.norm"])
def test_missing_tensor(name: str, checkpoint: Path, config: VllmConfig) -> None:
    """VLLM would go on with whatever is in memory."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[f"{name}.weight"]
    with pytest.raises(FPTQuantError, match=f"the checkpoint has no {name}.weight: it is incomplete"):
        Stage(0, 1, checkpoint, config, tensors)


def test_embeddings_in_place_of_tokens_are_refused(checkpoint: Path, config: VllmConfig) -> None:
    config.model_config.enable_prompt_embeds = True
    with pytest.raises(FPTQuantError, match="needs token ids: leave --enable-prompt-embeds out"):
        Stage(0, 1, checkpoint, config)


def test_architecture_without_its_quantization(checkpoint: Path, config: VllmConfig) -> None:
    config.quant_config = None
    with pytest.raises(FPTQuantError, match="its quantization_config isn't fptquant's"):
        Stage(0, 1, checkpoint, config)


def compiled(stage: Stage) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """The decoder under torch.compile, an error where the graph would break; and the graphs, as they are made."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(stage.model.model.forward, fullgraph=True, dynamic=True, backend=backend), graphs


@pytest.mark.parametrize("config", ["float32", "bfloat16"], indirect=True)
def test_one_graph_that_equals_eager(stage: Callable[[int, int], Stage]) -> None:
    model = stage(0, 1)
    run, graphs = compiled(model)
    later = (TOKENS[:4] + 1, POSITIONS[:4] + 3)  # another length, no first token: the same graph
    with model.active(), set_forward_context(None, model.config), torch.inference_mode():
        assert torch.equal(run(TOKENS, POSITIONS, None), model(TOKENS, POSITIONS, None))
        assert torch.equal(run(*later, None), model(*later, None))
    (graph,) = graphs
    operator = "torch.ops._C.onednn_scaled_mm" if torch.cpu._is_vnni_supported() else "torch.ops.fptquant.linear("
    assert graph.code.count(operator) == 8  # two layers of qkv, o, gate_up, down


def test_graph_holds_nothing_of_the_checkpoint(
    stage: Callable[[int, int], Stage], checkpoint: Path, config: VllmConfig
) -> None:
    """VLLM's compile cache knows a checkpoint by its path and config.json: the tensors may be others next time."""
    tensors = load_file(checkpoint / "model.safetensors")
    others = {
        name: 1.25 * tensor if name.endswith(("_scale", "_sink", "sink_output")) else tensor
        for name, tensor in tensors.items()
    }
    for name in [name for name in tensors if name.endswith("zero_point")]:
        others[name] = -1 - tensors[name]
    for name in [name for name in tensors if name.endswith("sink_steady")]:
        others[name] = 1 - tensors[name]
    others, codes, outputs = bound(others, checkpoint), [], []
    for content in (tensors, others):
        model = Stage(0, 1, checkpoint, config, content)
        run, graphs = compiled(model)
        with model.active(), set_forward_context(None, config), torch.inference_mode():
            outputs.append(run(TOKENS, POSITIONS, None))
        codes.append([graph.code for graph in graphs])
    assert codes[0] == codes[1]
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2)
