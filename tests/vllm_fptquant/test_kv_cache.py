"""The static KV cache: which codes reach vLLM's attention, and what is made of its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import AutoWeightsLoader

from fptquant.errors import FPTQuantError
from fptquant.format import KVCacheScheme, Sink
from tests.vllm_fptquant.layers import HEAD_DIM, HEADS, KV_HEADS, build_attention, quant_config
from vllm_fptquant.kv_cache import StaticKVAttention, require_exact_cache

pytestmark = pytest.mark.usefixtures("parallel_world")
LIMITS = {4: (-8, 7), 8: (-128, 127)}


class Model(torch.nn.Module):
    """As much of a model as vLLM's weight loader looks at: `model.layers.0.self_attn.attn`."""

    def __init__(self, scheme: KVCacheScheme, sink: Sink | None = None, **sizes: int) -> None:
        super().__init__()
        self.quant_config = quant_config(kv_cache=scheme, sink=sink)
        module = torch.nn.Module()
        module.attn = build_attention(self.quant_config, **sizes)
        for name in ("self_attn", "0", "layers", "model"):
            parent = torch.nn.Module() if name != "model" else self
            parent.add_module(name, module)
            module = parent

    @property
    def attention(self) -> Attention:
        return self.get_submodule("model.layers.0.self_attn.attn")

    def load(self, tensors: dict[str, Tensor]) -> Attention:
        names = {f"model.layers.0.self_attn.{name}": tensor for name, tensor in tensors.items()}
        AutoWeightsLoader(self).load_weights(names.items())
        self.attention.quant_method.process_weights_after_loading(self.attention)
        self.attention.process_weights_after_loading(torch.float32)
        return self.attention


def tensors_for(scheme: KVCacheScheme, heads: int = KV_HEADS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = heads if scheme.strategy == "head" else 1
    low, high = LIMITS[scheme.bits]
    tensors = {}
    for side in "kv":
        tensors[f"{side}_scale"] = torch.rand(size, generator=generator) * 0.1 + 0.01
        if not scheme.symmetric:
            points = torch.randint(low, high + 1, (size,), generator=generator, dtype=torch.int32)
            tensors[f"{side}_zero_point"] = points
    return tensors


def shift() -> dict[str, Tensor]:
    return {"k_shift": torch.randn(KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))}


def constants() -> dict[str, Tensor]:
    steady = torch.tensor(1, dtype=torch.int32)
    return {"k_sink": torch.ones(KV_HEADS, HEAD_DIM), "v_sink": torch.ones(KV_HEADS, HEAD_DIM), "sink_steady": steady}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What reaches vLLM's attention; it answers with the query."""
    caught: dict[str, Tensor] = {}

    def forward(self: Attention, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        for name, states in (("query", query), ("key", key), ("value", value)):
            caught[name] = states.unflatten(1, (-1, HEAD_DIM))
        return query.clone()

    monkeypatch.setattr(Attention, "forward", forward)
    return caught


SCHEMES = [
    KVCacheScheme(bits=bits, symmetric=symmetric, strategy=strategy)
    for bits in (4, 8)
    for symmetric in (True, False)
    for strategy in ("tensor", "head")
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}-{s.symmetric}-{s.strategy}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
def test_codes_and_scales(scheme: KVCacheScheme, dtype: torch.dtype, shifted: bool, seen: dict[str, Tensor]) -> None:
    tensors = tensors_for(scheme)
    if shifted:
        scheme, tensors = scheme.model_copy(update={"shift": True}), tensors | shift()
    attention = Model(scheme).load(tensors)
    torch.manual_seed(1)
    query = torch.randn(5, HEADS * HEAD_DIM).to(dtype)
    # Views into one tensor, as vLLM's split of the fused projection gives them.
    key, value = (torch.randn(5, 2 * KV_HEADS * HEAD_DIM) * 3).to(dtype).chunk(2, -1)
    output = attention(query, key, value)

    low, high = LIMITS[scheme.bits]
    for side, x, name in (("k", key, "key"), ("v", value, "value")):
        scale = tensors[f"{side}_scale"].view(1, -1, 1)
        zero = tensors.get(f"{side}_zero_point", torch.zeros(1, dtype=torch.int32)).view(1, -1, 1)
        heads = x.float().reshape(5, KV_HEADS, HEAD_DIM)
        if side == "k":
            heads = heads - tensors.get("k_shift", torch.zeros(()))
        codes = (torch.round(heads / scale) + zero).clamp(low, high) - zero
        assert seen[name].dtype == dtype
        assert torch.equal(seen[name].float(), codes)  # exact in 16 bits too
        assert (codes != 0).any()

    def per_query_head(scale: Tensor) -> Tensor:
        return (scale if len(scale) == 1 else scale.repeat_interleave(HEADS // KV_HEADS)).view(1, -1, 1)

    queries = (query.view(5, HEADS, HEAD_DIM) * per_query_head(tensors["k_scale"])).to(dtype)
    assert torch.equal(seen["query"], queries)
    expected = (queries * per_query_head(tensors["v_scale"])).to(dtype).reshape(5, -1)
    assert output.dtype == dtype
    assert torch.equal(output, expected)


def test_attention_layer_is_still_vllms() -> None:
    attention = build_attention(quant_config(kv_cache=KVCacheScheme(bits=4)))
    assert type(attention) is StaticKVAttention
    assert isinstance(attention, Attention)


def test_vllms_own_scales_stay_one() -> None:
    scheme = KVCacheScheme()
    attention = Model(scheme).load(tensors_for(scheme))
    assert attention._k_scale == attention._v_scale == 1
    assert attention._k_scale_float == attention._v_scale_float == 1


@pytest.mark.parametrize("strategy", ["tensor", "head"])
@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (4, 4), (4, 2), (4, 1)])
def test_heads_of_every_rank(
    strategy: Any, size: int, kv_heads: int, parallel_world: Callable[[int, int], None]
) -> None:
    scheme = KVCacheScheme(bits=4, strategy=strategy)
    tensors = tensors_for(scheme, kv_heads)
    local = max(1, kv_heads // size)
    for rank in range(size):
        parallel_world(rank, size)
        attention = Model(scheme, heads=4 * local, kv_heads=local).load(tensors)
        keys, values = attention.fptquant_kv_scale.view(2, local, HEAD_DIM).unbind()
        for side, scales in (("k", keys), ("v", values)):
            scale = tensors[f"{side}_scale"].expand(kv_heads)
            first = rank * kv_heads // size
            assert torch.equal(scales, scale[first : first + local, None].expand(local, HEAD_DIM))
        assert torch.equal(attention.fptquant_query_scale.view(local, 4, HEAD_DIM), keys[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (4, 2)])
def test_constants_of_every_rank(size: int, kv_heads: int, parallel_world: Callable[[int, int], None]) -> None:
    scheme = KVCacheScheme(bits=4, symmetric=True, strategy="head", shift=True)
    tensors = tensors_for(scheme, kv_heads) | {"k_shift": torch.randn(kv_heads, HEAD_DIM)}
    for side in "kv":
        tensors[f"{side}_sink"] = torch.randn(kv_heads, HEAD_DIM)
    tensors["sink_steady"] = torch.tensor(1, dtype=torch.int32)
    local = max(1, kv_heads // size)
    for rank in range(size):
        parallel_world(rank, size)
        attention = Model(scheme, Sink(token=0), heads=4 * local, kv_heads=local).load(tensors)
        heads = slice(rank * kv_heads // size, rank * kv_heads // size + local)
        assert torch.equal(attention.fptquant_kv_shift[: local * HEAD_DIM], tensors["k_shift"][heads].flatten())
        assert not attention.fptquant_kv_shift[local * HEAD_DIM :].any()  # values keep their mean
        constant = {"k": tensors["k_sink"] - tensors["k_shift"], "v": tensors["v_sink"]}
        expected = [(constant[side] / tensors[f"{side}_scale"][:, None])[heads].flatten() for side in "kv"]
        assert torch.equal(attention.fptquant_sink_codes, torch.cat(expected))
        assert attention.fptquant_sink_steady.all()


class TestBadCheckpoints:
    """Named errors instead of vLLM's silent default of one."""

    @pytest.mark.parametrize("missing", ["k_scale", "v_scale", "k_zero_point", "v_zero_point"])
    @pytest.mark.parametrize("strategy", ["tensor", "head"])
    def test_missing(self, missing: str, strategy: Any) -> None:
        scheme = KVCacheScheme(bits=4, strategy=strategy)
        tensors = tensors_for(scheme)
        del tensors[missing]
        with pytest.raises(FPTQuantError, match=f"model.layers.0.self_attn.{missing} is missing"):
            Model(scheme).load(tensors)

    @pytest.mark.parametrize("missing", ["k_sink", "v_sink", "sink_steady"])
    def test_missing_constant(self, missing: str) -> None:
        scheme = KVCacheScheme(bits=4)
        tensors = tensors_for(scheme) | constants()
        del tensors[missing]
        with pytest.raises(FPTQuantError, match=f"model.layers.0.self_attn.{missing} is missing"):
            Model(scheme, Sink(token=0)).load(tensors)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("sink_steady", torch.tensor(7, dtype=torch.int32), "neither 0 nor 1"),
            ("k_scale", torch.tensor([1e-39]), "k_sink is missing, not finite, or too large for its scale"),
            ("v_sink", torch.zeros(KV_HEADS, 5), r"v_sink has shape \[2, 5\], but \[2, 32\] is needed"),
        ],
    )
    def test_bad_constant(self, name: str, value: Tensor, message: str) -> None:
        scheme = KVCacheScheme(bits=4)
        with pytest.raises(FPTQuantError, match=message):
            Model(scheme, Sink(token=0)).load(tensors_for(scheme) | constants() | {name: value})

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "k_shift is missing or not finite"),
            ({"k_shift": torch.full((KV_HEADS, HEAD_DIM), torch.nan)}, "k_shift is missing or not finite"),
            ({"k_shift": torch.zeros(KV_HEADS, 5)}, r"k_shift has shape \[2, 5\], but \[2, 32\] is needed"),
        ],
    )
    def test_bad_shift(self, tensors: dict[str, Tensor], message: str) -> None:
        scheme = KVCacheScheme(bits=4, shift=True)
        with pytest.raises(FPTQuantError, match=message):
            Model(scheme).load(tensors_for(scheme) | tensors)

    @pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0])
    def test_bad_scale(self, bad: float) -> None:
        scheme = KVCacheScheme(bits=4, strategy="head")
        tensors = tensors_for(scheme)
        tensors["v_scale"][1] = bad
        with pytest.raises(FPTQuantError, match=f"self_attn.v_scale is {bad:g} at index 1"):
            Model(scheme).load(tensors)

    def test_zero_point_out_of_range(self) -> None:
        scheme = KVCacheScheme(bits=4)
        tensors = tensors_for(scheme)
        tensors["k_zero_point"][0] = 8
        with pytest.raises(FPTQuantError, match=r"k_zero_point is missing or outside of \[-8, 7\]"):
            Model(scheme).load(tensors)

    def test_wrong_number_of_heads(self) -> None:
        scheme = KVCacheScheme(bits=4, strategy="head")
        with pytest.raises(FPTQuantError, match="k_scale: 3 heads, but the model has 2 KV heads"):
            Model(scheme).load(tensors_for(scheme, heads=3))

    def test_per_head_scales_for_a_per_tensor_scheme(self) -> None:
        tensors = tensors_for(KVCacheScheme(bits=4, strategy="head"))
        with pytest.raises(FPTQuantError, match=r"k_scale has shape \[2\], but \[1\] is needed here"):
            Model(KVCacheScheme(bits=4)).load(tensors)

    def test_one_scale_for_a_scheme_per_head(self) -> None:
        scheme = KVCacheScheme(bits=4, strategy="head")
        with pytest.raises(FPTQuantError, match="k_scale: 1 heads, but the model has 2 KV heads"):
            Model(scheme).load(tensors_for(scheme) | {"k_scale": torch.tensor(0.1)})

    def test_scales_nothing_asked_for(self) -> None:
        scheme = KVCacheScheme(bits=16)
        model = Model(scheme)
        names = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
        with pytest.raises(ValueError, match="no module or parameter named.*k_scale"):
            AutoWeightsLoader(model).load_weights(names.items())


@pytest.mark.parametrize(
    ("cache", "dtype", "largest", "exact"),
    [
        ("auto", torch.float32, 255, True),
        ("auto", torch.bfloat16, 255, True),
        ("auto", torch.float16, 255, True),
        ("bfloat16", torch.float32, 255, True),
        ("fp8", torch.float32, 15, True),
        ("fp8_e4m3", torch.float32, 15, True),
        ("fp8_e4m3", torch.float32, 127, False),
        ("fp8_e5m2", torch.float32, 8, False),
        ("nvfp4", torch.float32, 1, False),
    ],
)
def test_cache_types(cache: str, dtype: torch.dtype, largest: int, exact: bool) -> None:
    attention = build_attention(None)
    attention.kv_cache_dtype, attention.kv_cache_torch_dtype = cache, dtype
    if exact:
        require_exact_cache("layer", attention, largest, sink=False)
    else:
        with pytest.raises(FPTQuantError, match=f"{cache} cannot hold integers up to {largest} exactly"):
            require_exact_cache("layer", attention, largest, sink=False)
    if cache == "fp8":
        with pytest.raises(FPTQuantError, match="fp8 would round the first token's constants"):
            require_exact_cache("layer", attention, largest, sink=True)
    elif exact and "fp8" not in cache:
        require_exact_cache("layer", attention, largest, sink=True)


def test_backend_that_quantizes_the_query_is_refused() -> None:
    scheme = KVCacheScheme(bits=4)
    model = Model(scheme)
    model.attention.query_quant = object()
    with pytest.raises(FPTQuantError, match="quantizes the query"):
        model.load(tensors_for(scheme))
