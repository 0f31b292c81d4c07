"""The battery that every transform in the registry passes, each alone and all together, on every kind of model.

A transform added to `TRANSFORMS` is tested here without a change.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from fptquant.errors import FPTQuantError
from fptquant.format import InputHadamard, hadamard_factors
from fptquant.recipe import Recipe
from fptquant.transforms import TRANSFORMS, TransformSet
from fptquant.transforms.down_hadamard import tensor_parallel_sizes
from fptquant.transforms.orthogonal import starting_rotation
from fptquant.wiring import Architecture, Place, Role, Shape
from fptquant.wiring.llama import LLAMA
from tests.conftest import MODELS
from tests.merging import merge_transforms

NAMES = list(TRANSFORMS)
SETS = [[name] for name in NAMES] + [NAMES]
SET_IDS = [*NAMES, "all"]


def transform_set(names: list[str], shape: Shape, seed: int = 0, **options: dict[str, Any]) -> TransformSet:
    """Transforms as a recipe makes them."""
    recipe = Recipe.parse({"transforms": {name: options.get(name, True) for name in names}})
    return TransformSet(recipe.transforms, shape, seed)


def merge(model: Any, transforms: TransformSet, family: Architecture = LLAMA) -> Any:
    """A merged copy, with T_d and T_h run online by dense float64 matrices built here."""
    model = copy.deepcopy(model)
    for _ in merge_transforms(model, family, transforms):
        pass
    record = transforms.record()
    blocks: dict[str, int | None] = dict.fromkeys(group.name for group in family.groups)
    blocks.update(record.input_hadamard or {})
    blocks["down"] = blocks["shared_down"] = None if record.down_hadamard is None else record.down_hadamard.block
    for index, layer in enumerate(family.layer_modules(model)):
        for group in family.groups_of(index):
            if (block := blocks[group.name]) is None:
                continue
            hadamard = dense_hadamard(block)

            def rotate(module: torch.nn.Module, args: tuple[Tensor], hadamard: Tensor = hadamard) -> tuple[Tensor]:
                parts = args[0].unflatten(-1, (-1, hadamard.shape[0]))
                return ((parts @ hadamard.to(args[0].dtype)).flatten(-2),)

            for projection in group.members:
                layer.get_submodule(projection.path).register_forward_pre_hook(rotate)
    return model


def block_of(transforms: TransformSet) -> int:
    down_hadamard = transforms.record().down_hadamard
    assert down_hadamard is not None
    return down_hadamard.block


def dense_hadamard(block: int) -> Tensor:
    """Sylvester's matrix by its definition, H[i, j] = (-1)^popcount(i & j), orthonormal."""
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(block)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def random_transforms(names: list[str], model: LlamaForCausalLM, seed: int = 0) -> TransformSet:
    transforms = transform_set(names, LLAMA.shape(model.config), seed)
    transforms.randomize_(torch.Generator().manual_seed(seed))
    return transforms


# -- function preserved: T1 and T2 of method.md 7 --


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", SETS, ids=SET_IDS)
def test_function_is_preserved_at_random_values(
    kind: str,
    names: list[str],
    make_model: Callable[..., LlamaForCausalLM],
    tokens: Tensor,
    float64_norms: None,
) -> None:
    model = make_model(kind).double()
    transforms = random_transforms(names, model)
    merged = merge(model, transforms)
    assert relative_error(merged(tokens).logits, model(tokens).logits) < 1e-9
    moved = [name for name, parameter in transforms.named_parameters() if parameter.abs().max() < 0.1]
    assert not moved, "randomize_ left parameters near their starting value, so nothing was tested"


@pytest.mark.parametrize("kind", MODELS)
def test_function_is_preserved_in_float32(
    kind: str, make_model: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    model = make_model(kind)
    assert relative_error(merge(model, random_transforms(NAMES, model))(tokens).logits, model(tokens).logits) < 2e-5


def test_norm_gains_and_tied_head_are_folded_where_a_transform_needs_it(
    make_model: Callable[..., LlamaForCausalLM], tokens: Tensor, float64_norms: None
) -> None:
    model = make_model("tied").double()
    merged = merge(model, transform_set(["S_n"], LLAMA.shape(model.config)))
    assert relative_error(merged(tokens).logits, model(tokens).logits) < 1e-12
    assert all(bool((p == 1).all()) for name, p in merged.named_parameters() if "norm" in name)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(merged.lm_head.weight, model.lm_head.weight)


def test_merging_does_not_touch_the_transforms(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model("bias")
    transforms = random_transforms(NAMES, model)
    before = copy.deepcopy(transforms.state_dict())
    merge(model, transforms)
    assert all(torch.equal(value, before[name]) for name, value in transforms.state_dict().items())


# -- the check above notices what people get wrong: each of these breaks the function --


def wrong_query_inverse(transforms: TransformSet, role: Role) -> None:
    """The inverse instead of the inverse transpose: the query turns the other way."""
    if role is Role.QUERY:
        transforms.transforms["T_k"].angle.mul_(-1)


def wrong_query_scale(transforms: TransformSet, role: Role) -> None:
    if role is Role.QUERY:
        transforms.transforms["T_k"].log_scale.mul_(-1)


def wrong_up_scale(transforms: TransformSet, role: Role) -> None:
    if role is Role.UP:
        transforms.transforms["T_u"].log_scale.mul_(-1)


def wrong_value_transpose(transforms: TransformSet, role: Role) -> None:
    """T^-1 instead of T^-T: swaps the orthogonal factors of the singular value decomposition."""
    if role is Role.OUTPUT:
        t = transforms.transforms["T_v"]
        left, right = t.left.clone(), t.right.clone()
        t.left.copy_(right)
        t.right.copy_(left)


def wrong_rotation(transforms: TransformSet, role: Role) -> None:
    """R instead of R^T where the residual is written."""
    if role in (Role.OUTPUT, Role.DOWN):
        transforms.transforms["T_r"].start.copy_(transforms.transforms["T_r"].rotation(torch.float64).mT.clone())
        transforms.transforms["T_r"].skew.zero_()
        transforms.transforms["T_r"]._cached = None


WRONG = {
    "T_k": (wrong_query_inverse, wrong_query_scale),
    "T_u": (wrong_up_scale,),
    "T_v": (wrong_value_transpose,),
    "T_r": (wrong_rotation,),
}


@pytest.mark.parametrize("name, mistake", [(name, mistake) for name, mistakes in WRONG.items() for mistake in mistakes])
def test_a_wrong_half_of_a_pair_is_noticed(
    name: str,
    mistake: Callable[[TransformSet, Role], None],
    make_model: Callable[..., LlamaForCausalLM],
    tokens: Tensor,
    float64_norms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("bias").double()
    transforms = random_transforms([name], model)
    original = TransformSet.merge

    @torch.no_grad()
    def merge_wrongly(
        self: TransformSet, place: Place, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        wrong = copy.deepcopy(self)
        mistake(wrong, place.role)
        return original(wrong, place, weight, bias)

    monkeypatch.setattr(TransformSet, "merge", merge_wrongly)
    assert relative_error(merge(model, transforms)(tokens).logits, model(tokens).logits) > 1e-3


@pytest.mark.parametrize("name", ["T_k", "T_v"])
def test_tiling_instead_of_repeating_kv_heads_is_noticed(
    name: str,
    make_model: Callable[..., LlamaForCausalLM],
    tokens: Tensor,
    float64_norms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Query head h uses KV head h // G; h % K is the classic mistake and is the same for MHA and MQA."""

    def tile(self: Tensor, repeats: int, dim: int) -> Tensor:
        return self.repeat(repeats, *[1] * (self.dim() - 1))

    for kind, noticed in (("bias", True), ("mha", False), ("mqa", False)):
        model = make_model(kind).double()
        with monkeypatch.context() as patch:
            transforms = random_transforms([name], model)
            patch.setattr(Tensor, "repeat_interleave", tile)
            merged = merge(model, transforms)
        error = relative_error(merged(tokens).logits, model(tokens).logits)
        assert (error > 1e-3) is noticed, kind


def test_interleaved_pairs_are_noticed(
    make_model: Callable[..., LlamaForCausalLM],
    tokens: Tensor,
    float64_norms: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RoPE pairs are (j, j + d/2) here; T_k over (2j, 2j + 1) does not commute with it."""
    model = make_model("gqa").double()
    transforms = random_transforms(["T_k"], model)
    original = type(transforms.transforms["T_k"]).outputs
    order = torch.arange(model.config.head_dim).view(2, -1).T.flatten()  # 0, d/2, 1, d/2 + 1, ...
    back = torch.argsort(order)

    def interleaved(self: Any, place: Place, values: Tensor) -> Any:
        if place.role not in (Role.QUERY, Role.KEY):
            return values
        heads = values.view(*values.shape[:-1], -1, order.numel())
        changed = original(self, place, heads[..., back].reshape(values.shape))
        return changed.view(heads.shape)[..., order].reshape(values.shape)

    monkeypatch.setattr(type(transforms.transforms["T_k"]), "outputs", interleaved)
    assert relative_error(merge(model, transforms)(tokens).logits, model(tokens).logits) > 1e-3


# -- starting values --


@pytest.mark.parametrize(
    "name, options",
    [("T_k", {}), ("T_u", {}), ("T_v", {"start": "identity"}), ("T_r", {"start": "identity"})],
)
def test_start_is_the_identity_where_it_should_be(
    name: str, options: dict[str, Any], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_model("bias")
    folded = merge(model, transform_set(["S_n"] if name == "T_r" else [], LLAMA.shape(model.config)))
    merged = merge(model, transform_set([name], LLAMA.shape(model.config), **{name: options}))
    for key, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, folded.get_parameter(key), rtol=0, atol=1e-7, msg=key)


def test_t_r_and_t_v_start_as_hadamards_with_random_signs() -> None:
    shape = Shape(hidden=48, intermediate=64, heads=3, kv_heads=3, head_dim=16, layers=1)
    transforms = transform_set(["T_r", "T_v"], shape)
    rotation = transforms.transforms["T_r"].rotation(torch.float64)
    torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, 48**-0.5))
    matrix, _ = transforms.transforms["T_v"].matrices(0, torch.float64)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 0.25))
    other = transform_set(["T_r"], shape, seed=1).transforms["T_r"].rotation(torch.float64)
    assert not torch.equal(rotation, other)
    assert torch.equal(rotation, transform_set(["T_r"], shape).transforms["T_r"].rotation(torch.float64))


@pytest.mark.parametrize("size", [1, 2, 6, 12, 20, 24, 28, 36, 42, 50, 64, 72, 100, 144, 180, 192])
def test_starting_rotation_is_orthogonal_for_any_size(size: int) -> None:
    start = starting_rotation(size, torch.Generator().manual_seed(0))
    assert start.shape == (size, size) and start.dtype == torch.float64 and start.is_contiguous()
    torch.testing.assert_close(start.T @ start, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


# -- parameters: gradients, saving, bounds --

SHAPE = Shape(hidden=20, intermediate=24, heads=4, kv_heads=2, head_dim=6, layers=2)


def all_merged(transforms: TransformSet, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every weight and bias of a small model, merged."""
    generator = torch.Generator().manual_seed(5)
    d, m, q, kv = SHAPE.hidden, SHAPE.intermediate, 24, 12
    sizes = {
        Role.QUERY: (q, d), Role.KEY: (kv, d), Role.VALUE: (kv, d), Role.OUTPUT: (d, q),
        Role.GATE: (m, d), Role.UP: (m, d), Role.DOWN: (d, m), Role.HEAD: (30, d), Role.EMBEDDING: (30, d),
    }  # fmt: skip
    merged = {}
    for role, size in sizes.items():
        for layer in [-1] if role in (Role.HEAD, Role.EMBEDDING) else range(SHAPE.layers):
            weight = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            bias = torch.randn(size[0], generator=generator, dtype=torch.float64).to(dtype)
            if role in (Role.HEAD, Role.EMBEDDING):
                bias = None
            merged[f"{role.value}.{layer}"], new_bias = transforms.merge(Place(role, layer), weight, bias)
            if new_bias is not None:
                merged[f"{role.value}.{layer}.bias"] = new_bias
    return merged


@pytest.mark.parametrize("names", SETS, ids=SET_IDS)
def test_every_parameter_gets_a_gradient_through_the_merge(names: list[str]) -> None:
    """From the starting point, where training begins; S_n, T_d and T_h have nothing to train."""
    transforms = transform_set(names, SHAPE)
    merged = all_merged(transforms, torch.float32)
    assert all(weight.dtype == torch.float32 for weight in merged.values())
    parameters = dict(transforms.named_parameters())
    if not parameters:
        assert set(names) <= {"T_d", "T_h", "S_n"}
        return
    # The paper's stage-1 loss; the gradient of a rotation of an isotropic weight would vanish for p = 2.
    loss = torch.stack([weight.pow(4).mean().pow(0.25) for weight in merged.values()]).sum()
    loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        per_layer = parameter.grad.flatten(1) if "T_r" not in name else parameter.grad.flatten()[None]
        assert bool((per_layer.abs().amax(1) > 1e-8).all()), f"{name}: no gradient in some layer"


@pytest.mark.parametrize("names", SETS, ids=SET_IDS)
def test_save_and_load(names: list[str], tmp_path: Any) -> None:
    transforms = transform_set(names, SHAPE)
    transforms.randomize_(torch.Generator().manual_seed(3))
    save_file(dict(transforms.state_dict()), tmp_path / "t.safetensors")
    loaded = transform_set(names, SHAPE, seed=9)  # another start, which the file must replace
    with torch.no_grad():
        all_merged(loaded)  # fills caches, which loading must invalidate
    loaded.load_state_dict(load_file(tmp_path / "t.safetensors"))
    with torch.no_grad():
        expected, actual = all_merged(transforms), all_merged(loaded)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_rotation_follows_its_parameter_despite_the_cache() -> None:
    rotation = transform_set(["T_r"], SHAPE).transforms["T_r"]
    with torch.no_grad():
        first = rotation.rotation(torch.float64)
        assert rotation.rotation(torch.float64) is first
        rotation.skew.add_(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
        assert not torch.allclose(rotation.rotation(torch.float64), first)


@pytest.mark.parametrize("strength", [0.5, 30.0])
def test_t_r_stays_orthogonal(strength: float) -> None:
    """T8: |R^T R - I| < 1e-5, far from the start too."""
    transforms = transform_set(["T_r"], Shape(64, 64, 4, 4, 16, 1))
    transforms.randomize_(torch.Generator().manual_seed(0), strength)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4 if strength > 1 else 1e-5)):
        rotation = transforms.transforms["T_r"].rotation(dtype)
        assert (rotation.T @ rotation - torch.eye(64, dtype=dtype)).abs().max() < limit


@pytest.mark.parametrize("limit", [2.0, 100.0])
@pytest.mark.parametrize("strength", [0.1, 1.0, 1e4])
def test_t_v_can_not_become_singular(strength: float, limit: float) -> None:
    transforms = transform_set(["T_v"], SHAPE, T_v={"max_condition": limit})
    transforms.randomize_(torch.Generator().manual_seed(0), strength)
    value = transforms.transforms["T_v"]
    with torch.no_grad():
        value.log_scale.mul_(100)
        for layer in range(SHAPE.layers):
            matrix, inverse_transpose = value.matrices(layer, torch.float64)
            assert bool((torch.linalg.cond(matrix) <= limit * (1 + 1e-6)).all())
            identity = torch.eye(SHAPE.head_dim, dtype=torch.float64).expand_as(matrix)
            torch.testing.assert_close(matrix @ inverse_transpose.mT, identity, rtol=0, atol=1e-9)
    if strength == 1e4:
        assert torch.linalg.cond(matrix).max() > 0.99 * limit, "the bound was never reached"


def test_scales_stay_positive() -> None:
    """A negative scale would flip signs: k' and q' both turn by 180 degrees unnoticed, but up_proj's rows would not."""
    transforms = transform_set(["T_u", "T_k"], SHAPE)
    with torch.no_grad():
        for parameter in transforms.parameters():
            parameter.fill_(-8.0)
        transforms.transforms["T_k"].angle.zero_()
        for role in (Role.UP, Role.DOWN, Role.KEY, Role.QUERY):
            size = {Role.UP: (24, 20), Role.DOWN: (20, 24), Role.KEY: (12, 20), Role.QUERY: (24, 20)}[role]
            weight, _ = transforms.merge(Place(role, 0), torch.ones(size), None)
            assert bool((weight > 0).all()) and bool(torch.isfinite(weight).all())


# -- families --


def test_obstacles() -> None:
    """Llama has none; a norm of queries or keys alone forbids T_k, norms behind blocks T_r and S_n."""
    assert {transform.obstacle(LLAMA) for transform in TRANSFORMS.values()} == {None}
    for facts, forbidden in (
        ({"query_norm": "q_norm"}, ["T_k"]),
        ({"key_norm": "k_norm"}, ["T_k"]),
        ({"post_norms": ("a_norm", "b_norm")}, ["T_r", "S_n"]),
    ):
        family = dataclasses.replace(LLAMA, **facts)  # type: ignore[arg-type]
        assert [name for name, transform in TRANSFORMS.items() if transform.obstacle(family)] == forbidden


# -- options --


@pytest.mark.parametrize("intermediate, block", [(64, 64), (56, 8), (44, 4), (11008, 256), (1536, 512), (33, 1)])
def test_t_d_takes_the_largest_power_of_two(intermediate: int, block: int) -> None:
    assert block_of(transform_set(["T_d"], Shape(8, intermediate, 1, 1, 8, 1))) == block


# Heads, KV heads, head size, intermediate size; the sizes up to 8 they can be served at, and the block.
MODELS = {
    "Llama-3-8B": (32, 8, 128, 14336, [1, 2, 4, 8], 256),
    "Llama-3.2-3B": (24, 8, 128, 8192, [1, 2, 4, 8], 1024),
    "Qwen2.5-7B": (28, 4, 128, 18944, [1, 2, 4], 128),
    "Qwen3-8B": (32, 8, 128, 12288, [1, 2, 4, 8], 512),
    "TinyLlama": (32, 4, 64, 5632, [1, 2, 4, 8], 64),
    "SmolLM2-135M": (9, 3, 64, 1536, [1, 3], 512),  # no even size splits 9 heads
    "replicated KV heads": (8, 1, 32, 256, [1, 2, 4, 8], 32),
    "words of 8 weights": (4, 4, 32, 144, [1, 2], 8),  # 4 ranks would have 36 columns
}


@pytest.mark.parametrize("heads, kv_heads, head_dim, intermediate, sizes, block", MODELS.values(), ids=list(MODELS))
def test_t_d_block_suits_every_tensor_parallel_size(
    heads: int, kv_heads: int, head_dim: int, intermediate: int, sizes: list[int], block: int
) -> None:
    shape = Shape(heads * head_dim, intermediate, heads, kv_heads, head_dim, 1)
    assert tensor_parallel_sizes(shape, 8) == sizes
    assert block_of(transform_set(["T_d"], shape)) == block
    assert all(intermediate // size % block == 0 for size in sizes)
    assert any(intermediate // size % (2 * block) for size in sizes)  # no larger one would
    alone = transform_set(["T_d"], shape, T_d={"max_tensor_parallel": 1})
    assert block_of(alone) == intermediate & -intermediate


def test_t_d_block_can_be_chosen() -> None:
    shape = Shape(8, 96, 1, 1, 8, 1)
    assert block_of(transform_set(["T_d"], shape, T_d={"block": 8})) == 8
    with pytest.raises(FPTQuantError, match="block 64 does not divide the intermediate size 96.* up to 32"):
        transform_set(["T_d"], shape, T_d={"block": 64})


def test_t_d_merges_the_dense_hadamard() -> None:
    shape = Shape(8, 48, 1, 1, 8, 1)
    weight = torch.randn(8, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged, _ = transform_set(["T_d"], shape).merge(Place(Role.DOWN, 0), weight, None)
    expected = weight @ torch.block_diag(*[dense_hadamard(16)] * 3)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-14)
    assert hadamard_factors(16)[0].shape == (4, 4)


# Hidden size of Gemma 3 (270M, 1B, 4B, 12B, 27B), Gemma 2 (2B), Llama 3 (8B), and the block.
@pytest.mark.parametrize(
    "hidden, block",
    [(640, 128), (1152, 128), (2560, 512), (3840, 256), (5376, 256), (2304, 256), (4096, 4096)],
)
def test_t_h_takes_the_largest_power_of_two_whatever_the_split(hidden: int, block: int) -> None:
    shape = Shape(hidden, 64, 8, 4, 96, 1)
    assert transform_set(["T_h"], shape).record().input_hadamard == InputHadamard(qkv=block, gate_up=block)
    everywhere = transform_set(["T_h"], shape, T_h={"at": ["qkv", "o"]}).record().input_hadamard
    assert everywhere == InputHadamard(qkv=block, o=32)  # each of 8 ranks gets 96 columns
    assert not transform_set(["T_h"], shape).transforms["T_h"].obstacle(LLAMA)


def test_t_h_block_can_be_chosen() -> None:
    shape = Shape(96, 64, 1, 1, 8, 1)
    chosen = transform_set(["T_h"], shape, T_h={"block": 8, "at": ["gate_up"]})
    assert chosen.record().input_hadamard == InputHadamard(gate_up=8)
    for options, expected in (
        ({"block": 64}, "T_h: block 64 does not divide the hidden size 96; use a power of two up to 32"),
        ({"at": ["o"], "block": 16}, "T_h: block 16 does not divide the size of all heads 8"),
    ):
        with pytest.raises(FPTQuantError, match=expected):
            transform_set(["T_h"], shape, T_h=options)


@pytest.mark.parametrize("at", [["qkv"], ["o"], ["gate_up"], ["qkv", "o", "gate_up"]])
def test_t_h_at_each_place(
    at: list[str], make_model: Callable[..., LlamaForCausalLM], tokens: Tensor, float64_norms: None
) -> None:
    """With all others; and it is noticed where it doesn't run online."""
    model = make_model("gqa").double()
    transforms = transform_set(NAMES, LLAMA.shape(model.config), T_h={"at": at})
    transforms.randomize_(torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    assert relative_error(merge(model, transforms)(tokens).logits, expected) < 1e-11
    for _ in merge_transforms(model, LLAMA, transform_set(["T_h"], LLAMA.shape(model.config), T_h={"at": at})):
        pass
    assert relative_error(model(tokens).logits, expected) > 1e-3


def test_switching_one_transform_off_leaves_the_others_as_they_were() -> None:
    everything, without = transform_set(NAMES, SHAPE), transform_set(["T_r"], SHAPE)
    assert torch.equal(everything.transforms["T_r"].start, without.transforms["T_r"].start)
