"""The linear method on fake CUDA tensors: devices, types and shapes through every kernel, and graphs without breaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.linear import LinearBase

from fptquant.format import (
    ActivationScheme,
    DownHadamard,
    InputHadamard,
    KVCacheScheme,
    Sink,
    TransformRecord,
    WeightScheme,
    hadamard_factors,
)
from tests.vllm_fptquant.layers import (
    COLUMNS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SHARDS,
    build_attention,
    build_linear,
    load,
    quant_config,
)
from tests.vllm_fptquant.test_gpu_kernels import exact_tensors
from vllm_fptquant.kernels.gpu import ScaledInput
from vllm_fptquant.kernels.select import KERNELS
from vllm_fptquant.models.decoder import DecoderModel
from vllm_fptquant.models.projections import scaled_projection

pytestmark = pytest.mark.usefixtures("operators", "parallel_world", "pretend_gpu")

BLOCK = 32
# Kernel, weight bits, activation bits, symmetric.
CASES = [
    ("marlin-int8", 4, 8, True),
    ("marlin-int8", 4, 4, True),
    ("marlin-int8", 4, 4, False),
    ("marlin-cutlass-int8", 4, 8, True),
    ("marlin-cutlass-int8", 4, 4, False),
    ("cutlass-int8", 4, 8, True),
    ("cutlass-int8", 8, 8, False),
    ("cutlass-int8", 4, 4, False),
    ("triton-int8", 4, 8, True),
    ("triton-int8", 8, 4, False),
    ("humming-int4", 4, 4, True),
    ("humming-int8", 4, 8, True),
    ("humming-int8", 4, 4, False),
    ("humming-int8", 8, 8, True),
    ("marlin", 4, 16, True),
    ("marlin", 8, 16, True),
]


class SoundCheckpoint(TorchDispatchMode):
    """Answers what loading asks of values, which fake tensors have none of: no check fails, `weight_shape` is right."""

    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__()
        self.sizes = itertools.cycle(sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else next(self.sizes)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda(kind: str) -> Iterator[None]:
    hadamard_factors(BLOCK)  # cached: must not become fake
    sizes = (size for _, _, rows in SHARDS[kind] for size in (rows, COLUMNS[kind]))
    with FakeTensorMode(allow_non_fake_inputs=True), SoundCheckpoint(sizes):
        yield


def build(kind: str, kernel: str, weights: int, activations: int, symmetric: bool, **arguments: Any) -> LinearBase:
    config = quant_config(
        weights=WeightScheme(bits=weights),
        activations=ActivationScheme(bits=activations, symmetric=symmetric),
        transforms=TransformRecord(
            down_hadamard=DownHadamard(block=BLOCK), input_hadamard=InputHadamard(qkv=BLOCK), residual_scale=True
        ),
    )
    layer = build_linear(kind, config, **arguments)
    layer.quant_method.kernel_class = next(k for k in KERNELS if k.name == kernel)
    layer.quant_method.spec = replace(layer.quant_method.spec, widen_from=5)
    return load_on(layer, kind, config)


def load_on(layer: LinearBase, kind: str, config: Any) -> LinearBase:
    """Loads the checkpoint's tensors without the last step."""
    method = layer.quant_method
    finish = method.process_weights_after_loading
    method.process_weights_after_loading = lambda layer: None
    load(layer, exact_tensors(kind, config))
    method.process_weights_after_loading = finish
    return layer


def move_to_fake_cuda(layer: LinearBase) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
        layer._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qkv", "down"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fake_cuda(case: tuple[str, int, int, bool], kind: str, dtype: torch.dtype, fast: bool, bias: bool) -> None:
    """Loading and computing on a GPU without a GPU."""
    layer = build(kind, *case, params_dtype=dtype, bias=bias)
    layer.quant_method.fast_hadamard = fast
    n = HIDDEN if kind == "down" else 256
    with fake_cuda(kind):
        move_to_fake_cuda(layer)
        layer.quant_method.process_weights_after_loading(layer)
        buffers = dict(layer.named_buffers())
        assert buffers
        for name, buffer in buffers.items():
            assert isinstance(buffer, FakeTensor) and buffer.device.type == "cuda", name
        x = torch.empty(5, COLUMNS[kind], dtype=dtype, device="cuda")
        S = torch.empty(5, 1, device="cuda")
        for given in (x, ScaledInput(x, S), x.view(1, 5, -1)):
            output = layer(given)[0]
            assert output.device.type == "cuda" and output.dtype == dtype
            assert output.shape == (*(given.x if isinstance(given, ScaledInput) else given).shape[:-1], n)


@pytest.mark.usefixtures("cuda_guard")
def test_fake_run_notices_a_tensor_on_the_wrong_device() -> None:
    layer = build("down", "cutlass-int8", 4, 8, True, params_dtype=torch.bfloat16)
    with fake_cuda("down"):
        move_to_fake_cuda(layer)
        layer.quant_method.process_weights_after_loading(layer)
        layer.fptquant_gpu.low = torch.zeros(COLUMNS["down"])
        with pytest.raises(RuntimeError, match="device"):
            layer(torch.empty(5, COLUMNS["down"], dtype=torch.bfloat16, device="cuda"))


class Recorder:
    """A backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_one_graph_without_breaks(case: tuple[str, int, int, bool]) -> None:
    """Every number of rows runs the same graph, with the values of eager mode."""
    torch._dynamo.reset()
    layer = build("down", *case, params_dtype=torch.bfloat16, bias=True, skip_bias_add=True)
    layer.bias.data.copy_(torch.randn(HIDDEN))
    layer.quant_method.process_weights_after_loading(layer)
    recorder = Recorder()
    compiled = torch.compile(
        lambda x, S: scaled_projection(layer, x * 2, S), backend=recorder, fullgraph=True, dynamic=True
    )
    for rows in (2, 5, 9):
        x, S = torch.randn(rows, COLUMNS["down"]).bfloat16(), torch.rand(rows, 1) + 0.5
        assert torch.equal(compiled(x, S), scaled_projection(layer, x * 2, S))
    assert len(recorder.graphs) == 1
    # No value of the checkpoint is part of the graph: buffers are its inputs.
    constants = [
        argument
        for node in recorder.graphs[0].graph.nodes
        for argument in (*node.args, *node.kwargs.values())
        if isinstance(argument, float)
    ]
    assert not constants


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", ["marlin-int8", "marlin-cutlass-int8", "cutlass-int8", "triton-int8", "humming-int8", "humming-int4"]
)
def test_inductor(kernel: str) -> None:
    """The compiler's code hands kernels what they need: contiguous codes and row scales."""
    torch._dynamo.reset()
    layer = build("down", kernel, 4, 4 if kernel == "humming-int4" else 8, True, params_dtype=torch.bfloat16)
    layer.quant_method.process_weights_after_loading(layer)
    for S in (None, torch.rand(5, 1) + 0.5):
        compiled = torch.compile(lambda x, S: scaled_projection(layer, x * 2, S), fullgraph=True)
        x = torch.randn(5, COLUMNS["down"]).bfloat16()
        assert torch.equal(compiled(x, S), scaled_projection(layer, x * 2, S))


def test_inductor_divides_exactly_on_gpus() -> None:
    """The option that the plugin sets is the one that Inductor's GPU code reads."""
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonOverrides

    from vllm_fptquant.config import keep_division_exact

    options: dict[str, Any] = {}
    keep_division_exact(SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=options)))

    class Operand(str):
        dtype = torch.float32

    assert "div_rn" not in TritonOverrides.truediv(Operand("x"), Operand("s"))
    with config.patch(options):
        assert "div_rn" in TritonOverrides.truediv(Operand("x"), Operand("s"))


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["tensor", "head"])
@pytest.mark.parametrize("sink", [None, Sink(token=1)], ids=["no sink", "sink"])
def test_kv_cache_on_fake_cuda(strategy: Literal["tensor", "head"], sink: Sink | None, dtype: torch.dtype) -> None:
    """Keys and values are quantized where they are; nothing waits for the GPU."""
    scheme = KVCacheScheme(bits=4, strategy=strategy)
    attention = build_attention(quant_config(kv_cache=scheme, sink=sink))
    assert attention.use_direct_call is False  # through vLLM's operators, as it wants it on GPUs
    with fake_cuda("qkv"):
        move_to_fake_cuda(attention)
        attention.quant_method.process_weights_after_loading(attention)
        for name, buffer in attention.named_buffers():
            if name.startswith("fptquant"):
                assert buffer.device.type == "cuda", name
        query, key, value = (
            torch.empty(5, heads * HEAD_DIM, dtype=dtype, device="cuda") for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        first = torch.empty(5, dtype=torch.int64, device="cuda")
        masks = DecoderModel._first_tokens(SimpleNamespace(sink_token=1), first, first, None)
        assert masks is not None and masks.at_token.device.type == "cuda"
        where = masks.at_token | (masks.at_start & attention.fptquant_sink_steady) if sink else None
        output = attention(query, key, value, sink=where)
        assert output.shape == query.shape and output.dtype == dtype and output.device.type == "cuda"
