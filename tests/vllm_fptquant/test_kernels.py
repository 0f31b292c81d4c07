"""Every kernel computes the contract's arithmetic, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptquant.format import (
    ActivationScheme,
    LinearScheme,
    WeightScheme,
    block_hadamard,
    code_bounds,
    hadamard_factors,
    quantize,
    quantize_per_tensor,
    quantized_linear,
)
from fptquant.format.steps import Arrangement, Hadamard
from tests.vllm_fptquant.layers import steps_of
from vllm_fptquant.kernels.base import CpuKernel, LinearSpec, LinearWeights
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.onednn import OnednnKernel
from vllm_fptquant.kernels.operator import CHUNK, PreparedLinear, _prepared, linear, register_prepared
from vllm_fptquant.kernels.reference import ReferenceKernel

HAS_VNNI = torch.cpu._is_vnni_supported()
KERNELS = [
    FbgemmKernel,
    ReferenceKernel,
    pytest.param(OnednnKernel, marks=pytest.mark.skipif(not HAS_VNNI, reason="needs AVX512-VNNI")),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scheme(bits: int, symmetric: bool = True, weight_bits: int = 4) -> LinearScheme:
    return LinearScheme(
        weights=WeightScheme(bits=weight_bits), activations=ActivationScheme(bits=bits, symmetric=symmetric)
    )


def weights_of(
    bits: int, codes: Tensor, *, zero_point: int | None = None, scale: float = 0.37, weight_bits: int = 4
) -> LinearWeights:
    """Weights with codes (N, K); `zero_point` None means symmetric activations."""
    return LinearWeights(
        scheme=scheme(bits, zero_point is None, weight_bits),
        codes=codes.to(torch.int8),
        weight_scale=torch.rand(len(codes)) * 0.01 + 1e-4,
        input_scale=None if bits == 16 else torch.tensor(scale),
        input_zero_point=None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32),
    )


def contract(weights: LinearWeights, x: Tensor) -> Tensor:
    """The contract's result, the integer product in float64 so that it is exact at any size."""
    assert weights.input_scale is not None
    low, high = code_bounds(weights.zero_point, weights.scheme.activations.bits)
    codes = quantize(x, weights.input_scale, low, high)
    output_scale = weights.input_scale * weights.weight_scale
    return quantized_linear(codes.double(), weights.codes.double(), torch.ones(())).float() * output_scale


def with_block(weights: LinearWeights, block: int | None) -> Arrangement:
    """Steps of a layer with these weights, T_d before them where there is a block."""
    return steps_of(weights) if block is None else steps_of(weights, Hadamard(block))


def computed(kernel: type[CpuKernel], weights: LinearWeights, x: Tensor) -> Tensor:
    """The result of a layer with this kernel."""
    return PreparedLinear(kernel(weights), weights, steps_of(weights))(x, None)


@st.composite
def layers(draw: st.DrawFn) -> tuple[LinearWeights, Tensor]:
    """A random layer of any scheme FBGEMM knows, and an input with ties, extremes and infinities."""
    bits = draw(st.sampled_from([4, 8]))
    limit = 2 ** (bits - 1)
    zero_point = draw(st.none() | st.integers(-limit, limit - 1))
    m, k, n = draw(st.integers(1, 40) | st.just(CHUNK + 3)), draw(st.integers(1, 300)), draw(st.integers(1, 70))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = float(torch.tensor(draw(st.floats(1e-4, 1e3)), dtype=torch.float32))
    weights = weights_of(bits, torch.randint(-8, 8, (n, k)), zero_point=zero_point, scale=scale)
    x = torch.randn(m, k) * scale * limit
    ties = (torch.randint(-2 * limit, 2 * limit, (m, k)) + 0.5) * scale
    beside = torch.nextafter(ties, torch.zeros(()))
    kind = torch.randint(0, 12, (m, k))
    x = torch.where(kind == 0, ties, torch.where(kind == 1, beside, x))
    extremes = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 0.0, -0.0])
    x = torch.where(kind == 2, extremes[torch.randint(0, 6, (m, k))], x)
    return weights, x


@pytest.mark.parametrize("kernel", KERNELS)
@given(layer=layers())
@settings(max_examples=60, deadline=None)
def test_kernel_equals_contract(kernel: type[CpuKernel], layer: tuple[LinearWeights, Tensor]) -> None:
    weights, x = layer
    assert torch.equal(computed(kernel, weights, x), contract(weights, x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("bits", "zero_point"), [(8, None), (8, 127), (8, -128), (4, None), (4, 7), (4, -8)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(1, 1536, 64), (65, 576, 96), (3, 40000, 16)])
def test_largest_possible_sums(
    kernel: type[CpuKernel], bits: int, zero_point: int | None, sign: int, shape: tuple[int, int, int]
) -> None:
    m, k, n = shape
    weights = weights_of(bits, torch.full((n, k), -8), zero_point=zero_point)
    x = torch.full((m, k), sign * 1e6)
    assert torch.equal(computed(kernel, weights, x), contract(weights, x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_types(kernel: type[CpuKernel], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = weights_of(8, torch.randint(-8, 8, (48, 64)))
    x = torch.randn(5, 64).to(dtype)
    output = computed(kernel, weights, x)
    assert output.dtype == dtype
    assert torch.equal(output, contract(weights, x).to(dtype))


def test_eight_bit_weights_on_the_reference() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (32, 3000))
    weights = weights_of(8, codes, zero_point=-128, weight_bits=8)
    x = torch.rand(4, 3000) * 100
    assert torch.equal(computed(ReferenceKernel, weights, x), contract(weights, x))


def test_weight_only_layer() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (24, 56))
    weights = weights_of(16, codes)
    x = torch.randn(3, 56)
    expected = x.double() @ (codes.double() * weights.weight_scale.double()[:, None]).T
    torch.testing.assert_close(computed(ReferenceKernel, weights, x).double(), expected, rtol=1e-5, atol=1e-6)


@given(st.floats(1e-4, 1e3), st.integers(-128, 127), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_quantize_per_tensor_equals_quantize(scale: float, zero_point: int, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    s = torch.tensor(scale)
    x = torch.cat([torch.randn(200) * s * 100, (torch.arange(-200, 200) + 0.5) * s])
    low, high = code_bounds(torch.tensor(zero_point), bits)
    before = x.clone()
    assert torch.equal(quantize_per_tensor(x, s, low.item(), high.item()), quantize(x, s, low, high))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_refuses_other_devices(kernel: type[CpuKernel]) -> None:
    reason = kernel.can_implement(LinearSpec(scheme(8), 64, 64, torch.bfloat16, "cuda"))
    assert reason is not None and "cuda" in reason


def test_fbgemm_refuses_what_it_computes_wrongly() -> None:
    def reason(linear_scheme: LinearScheme) -> str | None:
        return FbgemmKernel.can_implement(LinearSpec(linear_scheme, 64, 64, torch.float32, "cpu"))

    assert reason(scheme(8)) is None
    assert reason(scheme(4, symmetric=False)) is None
    assert "saturate" in str(reason(scheme(8, weight_bits=8)))
    assert "16 bits" in str(reason(scheme(16)))


class TestOperator:
    """`fptquant::linear`: dispatch, compilation, lifetime."""

    def prepared(self, layer: torch.nn.Module, seed: int, block: int | None = None) -> tuple[PreparedLinear, Tensor]:
        torch.manual_seed(seed)
        weights = weights_of(8, torch.randint(-8, 8, (48, 64)))
        prepared = PreparedLinear(FbgemmKernel(weights), weights, with_block(weights, block))
        return prepared, register_prepared(layer, prepared)

    def test_rotates_adds_bias_and_keeps_shape_and_type(self) -> None:
        layer = torch.nn.Module()
        _, handle = self.prepared(layer, 0, block=16)
        x, bias = torch.randn(2, 3, 64), torch.randn(48)
        rotated = block_hadamard(x, *hadamard_factors(16))
        expected = self.prepared(layer, 0)[0](rotated, bias)
        assert torch.equal(linear(x, handle, bias, 48), expected)
        half = linear(x.bfloat16(), handle, bias, 48)
        assert half.dtype == torch.bfloat16 and half.shape == (2, 3, 48)

    @pytest.mark.parametrize("block", [None, 16])
    @pytest.mark.parametrize("activations", [8, 16])
    def test_many_rows_in_chunks(self, block: int | None, activations: int) -> None:
        torch.manual_seed(0)
        weights = weights_of(activations, torch.randint(-8, 8, (48, 64)))
        prepared = PreparedLinear(ReferenceKernel(weights), weights, with_block(weights, block))
        x = torch.randn(2 * CHUNK + 5, 64)
        one_by_one = torch.cat([prepared(row, None) for row in x.split(1)])
        torch.testing.assert_close(prepared(x, None), one_by_one, rtol=0, atol=1e-5)

    def test_no_rows(self) -> None:
        layer = torch.nn.Module()
        _, handle = self.prepared(layer, 0, block=16)
        assert linear(torch.empty(0, 64), handle, None, 48).shape == (0, 48)

    def test_one_graph_serves_whichever_weights_the_handle_names(self) -> None:
        first, second = torch.nn.Module(), torch.nn.Module()
        (a, handle_a), (b, handle_b) = self.prepared(first, 1), self.prepared(second, 2)
        graphs = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        @torch.compile(backend=backend, fullgraph=True, dynamic=True)
        def compiled(x: Tensor, handle: Tensor) -> Tensor:
            return linear(x * 2, handle, None, 48) + 1

        for rows in (1, 5, 9):
            x = torch.randn(rows, 64)
            assert torch.equal(compiled(x, handle_a), a(x * 2, None) + 1)
            assert torch.equal(compiled(x, handle_b), b(x * 2, None) + 1)
        assert len(graphs) <= 2  # one for a single row, one for any number

    @pytest.mark.skipif(not HAS_VNNI, reason="needs AVX512-VNNI")
    @pytest.mark.parametrize(
        ("bits", "zero_points"), [(8, (None, None)), (8, (-3, 90)), (4, (None, None)), (4, (-8, 5))], ids=str
    )
    def test_traced_kernel_meets_the_weights_that_are_there(
        self, bits: int, zero_points: tuple[int | None, int | None]
    ) -> None:
        """As vLLM compiles: without guards, so that a number baked into the graph would stay the first one."""

        class Layer(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return self.prepared(x * 2, None) + 1

        def prepared(seed: int, zero_point: int | None) -> PreparedLinear:
            torch.manual_seed(seed)
            codes = torch.randint(-8, 8, (48, 64))
            weights = weights_of(bits, codes, zero_point=zero_point, scale=0.01 * (seed + 1))
            return PreparedLinear(OnednnKernel(weights), weights, with_block(weights, 16))

        torch._dynamo.reset()  # without guards, a graph of another case would do for this one
        layer = Layer()
        compiled = torch.compile(
            layer, fullgraph=True, dynamic=True, options={"guard_filter_fn": lambda guards: [False for _ in guards]}
        )
        for seed, zero_point in enumerate(zero_points):
            layer.prepared = prepared(seed, zero_point)
            for rows in (5, 9, CHUNK + 1):
                x = torch.randn(rows, 64)
                assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("rows", [(7,), (2, 3), (0,), (CHUNK + 1,)], ids=str)
    def test_passes_torch_opcheck(self, rows: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
        """Schema, fake implementation, autograd registration, and AOTAutograd with sizes that change."""
        layer = torch.nn.Module()
        _, handle = self.prepared(layer, 0, block=16)
        x = torch.randn(*rows, 64).to(dtype)
        arguments = (x, handle, torch.randn(48).to(dtype) if bias else None, 48)
        torch.library.opcheck(torch.ops.fptquant.linear.default, arguments)
        output = torch.ops.fptquant.linear(*arguments)
        assert output.shape == (*rows, 48) and output.dtype == dtype

    def test_weights_are_freed_with_their_layer(self) -> None:
        layer = torch.nn.Module()
        _, handle = self.prepared(layer, 0)
        assert int(handle) in _prepared
        del layer
        assert int(handle) not in _prepared
