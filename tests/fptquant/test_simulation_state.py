"""One forward of a simulation leaves nothing behind that another reads: copies, threads, caches, casts, offloading."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from fptquant.errors import FPTQuantError
from fptquant.evaluation.dynamic import use_dynamic_ranges
from fptquant.simulate.install import set_exact
from tests.conftest import VOCABULARY
from tests.vllm_fptquant.serving import TRANSFORMS, quantized

CPU = torch.device("cpu")


def sequences(rows: int, length: int, seed: int) -> Tensor:
    """Tokens of which the first row starts with the sink's, 0, and has it once more."""
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = tokens[0, 4] = 0
    return tokens


TOKENS, OTHERS = sequences(2, 12, seed=0), sequences(3, 7, seed=1)


@pytest.fixture(scope="module", params=["sink, S_n", "sink", "S_n", "neither"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At w4a4kv4; where it has a sink, its second layer is steady."""
    transforms = TRANSFORMS + ["S_n"] * ("S_n" in request.param)
    sink = "auto" if "sink" in request.param else "none"
    return quantized(tmp_path_factory.mktemp("state"), sink=sink, transforms=transforms)


@pytest.fixture(scope="module")
def with_sink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0's values in floating point: at a later position, those of the sink's token equal the constant."""
    return quantized(tmp_path_factory.mktemp("sink"), ignore=[r"re:model\.layers\.0\.self_attn\.[qkv]_proj"])


def load(checkpoint: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, **{"dtype": torch.float32, **options}).eval()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_fresh_copy_is_the_model(checkpoint: Path) -> None:
    tokens = TOKENS[:1, :4]
    model = load(checkpoint)
    found = copy.deepcopy(model)(tokens).logits
    assert torch.equal(found, model(tokens).logits)


def pickled(model: Any, path: Path) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def on_cpu(model: Any, path: Path) -> Any:
    return accelerate.cpu_offload(model, CPU)


def on_disk(model: Any, path: Path) -> Any:
    return accelerate.disk_offload(model, str(path), CPU)


def compiled(model: Any, path: Path) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, dynamic=True, backend="eager")


@pytest.mark.parametrize("change", [lambda model, path: copy.deepcopy(model), pickled, on_cpu, on_disk, compiled],
                         ids=["deepcopy", "pickle", "cpu_offload", "disk_offload", "compile"])  # fmt: skip
def test_what_is_made_of_a_model_is_the_model(
    change: Callable[[Any, Path], Any], checkpoint: Path, tmp_path: Path
) -> None:
    """In turns with the model it was made of, on batches of other shapes."""
    expected = [load(checkpoint)(tokens, use_cache=False).logits for tokens in (TOKENS, OTHERS)]
    model = load(checkpoint)
    changed = change(model, tmp_path)
    assert torch.equal(changed(TOKENS, use_cache=False).logits, expected[0])
    assert torch.equal(model(OTHERS, use_cache=False).logits, expected[1])
    assert torch.equal(changed(TOKENS, use_cache=False).logits, expected[0])
    assert torch.equal(changed(OTHERS, use_cache=False).logits, expected[1])


def test_threads(checkpoint: Path) -> None:
    model = load(checkpoint)
    batches = [TOKENS, OTHERS] * 20
    expected = [model(tokens).logits for tokens in (TOKENS, OTHERS)] * 20
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def run(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens).logits  # type: ignore[no-any-return]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, batches))
    sys.setswitchinterval(interval)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_forward_within_a_forward(checkpoint: Path) -> None:
    model = load(checkpoint)
    expected, others = model(TOKENS).logits, model(OTHERS).logits
    found: list[Tensor] = []

    def enter(module: Any, args: Any) -> None:
        handle.remove()
        found.append(model(OTHERS).logits)

    for place in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        handle = model.get_submodule(f"model.layers.1.{place}").register_forward_pre_hook(enter)
        assert torch.equal(model(TOKENS).logits, expected), place
        assert torch.equal(found.pop(), others), place


def test_cast_as_loaded(checkpoint: Path) -> None:
    """Scales, integers and constants keep their types; the rest is cast as loading would."""
    expected = load(checkpoint, dtype=torch.bfloat16)
    for cast in (load(checkpoint).to(torch.bfloat16), load(checkpoint).bfloat16()):
        state = cast.state_dict()
        assert {name: (x.dtype, x.shape) for name, x in expected.state_dict().items()} == {
            name: (x.dtype, x.shape) for name, x in state.items()
        }
        assert torch.equal(cast(TOKENS).logits, expected(TOKENS).logits)
    with pytest.raises(ValueError, match=r"`.half\(\)` is not supported"):  # transformers', of all quantized models
        load(checkpoint).half()


def test_offloaded_buffers(checkpoint: Path, tmp_path: Path) -> None:
    """The constant of the final norm is put in place outside of it, where accelerate doesn't bring it back."""
    model = accelerate.cpu_offload(load(checkpoint), CPU, offload_buffers=True)
    if load(checkpoint).base_model.sink_token is None:
        assert torch.equal(model(TOKENS).logits, load(checkpoint)(TOKENS).logits)
    else:
        with pytest.raises(FPTQuantError, match="sink_output .* was offloaded: offload without offload_buffers=True$"):
            model(TOKENS)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")}
    places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    model = load(checkpoint, device_map=places, offload_folder=str(tmp_path))
    assert torch.equal(model(TOKENS).logits, load(checkpoint)(TOKENS).logits)
    with pytest.raises(FPTQuantError, match=r"model.layers.1.* was offloaded before .*: load the model without"):
        load(checkpoint, device_map=places, offload_folder=str(tmp_path), offload_buffers=True)


# -- caches and positions --


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_in_padded_batches(cache: str, checkpoint: Path) -> None:
    """Token for token as each prompt alone without a cache: exactly, so that no code depends on the order of sums."""
    model = load(checkpoint)
    set_exact(model)
    prompts = [TOKENS[0], TOKENS[1, :5], OTHERS[0, :7]]
    longest = max(map(len, prompts))
    padded = torch.stack([torch.cat((torch.zeros(longest - len(x), dtype=torch.int64), x)) for x in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(x)).long() for x in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(padded, attention_mask=mask, cache_implementation=cache, **options)[:, longest:]
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = model(torch.cat((prompt, tokens))[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(logits.argmax(-1), tokens)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_prefill_in_pieces(static: bool, checkpoint: Path) -> None:
    model = load(checkpoint)
    set_exact(model)
    cache = StaticCache(model.config, max_cache_len=20) if static else None
    found = []
    for piece in torch.split(TOKENS, (5, 1, 4, 2), 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), model(TOKENS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_padding_without_positions(with_sink: Path) -> None:
    """The first token is the first that isn't padding, though transformers counts padding too."""
    model = load(with_sink)
    set_exact(model)
    padded, mask = torch.nn.functional.pad(TOKENS, (3, 0), value=7), torch.ones(2, 15, dtype=torch.int64)
    mask[:, :3] = 0
    expected = model(TOKENS).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], expected, rtol=1e-5, atol=1e-5)
    start = model(padded[:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = model(padded[:, 6:], attention_mask=mask, past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 3:], rtol=1e-5, atol=1e-5)


def test_constants_go_by_position_not_by_value(with_sink: Path) -> None:
    """What is cached: constants in units of the scale at the start, integers behind, whatever was quantized."""
    model = load(with_sink)
    layers = model(TOKENS, use_cache=True).past_key_values.layers
    for index, (layer, cached) in enumerate(zip(model.model.layers, layers, strict=True)):
        for name, states in (("k", cached.keys), ("v", cached.values)):
            attention = layer.self_attn
            constant = attention.get_buffer(f"{name}_sink") / attention.get_buffer(f"{name}_scale")[:, None]
            rows = slice(None) if index == 1 else slice(1)  # the second sequence starts with another token
            assert torch.equal(states[rows, :, 0], constant.expand_as(states[rows, :, 0]))
            integers = states.clone()
            integers[rows, :, 0] = 0
            assert torch.equal(integers, integers.round())


def test_embeddings_in_place_of_tokens(checkpoint: Path) -> None:
    """A token's embedding is that token; any other vector is another first token."""
    model = load(checkpoint)
    embedded = model.get_input_embeddings()(TOKENS)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(TOKENS).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    options["attention_mask"] = torch.ones_like(TOKENS)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), model.generate(TOKENS, **options)[:, 12:])
    embedded[0, 0] = model.get_input_embeddings()(TOKENS[1, 0])
    tokens = torch.cat((TOKENS[1:, :1], TOKENS[:1, 1:]), 1)
    assert torch.equal(model(inputs_embeds=embedded[:1]).logits, model(tokens).logits)


def test_hidden_states_are_recorded(checkpoint: Path) -> None:
    """Also where the model's class is only known from a pickle; the last state is the one that the head reads."""
    model = load(checkpoint)
    output = model(TOKENS, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    base = model.base_model(TOKENS, output_hidden_states=True, return_dict=False)
    assert torch.equal(base[0], output.hidden_states[-1]) and torch.equal(base[-1][-1], base[0])


def test_pickle_in_another_process(with_sink: Path, tmp_path: Path) -> None:
    expected = load(with_sink)(TOKENS, output_hidden_states=True).hidden_states
    torch.save((load(with_sink), TOKENS, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, tokens, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): found = model(tokens, output_hidden_states=True).hidden_states\n"
        "assert len(found) == 3 and all(map(torch.allclose, found, expected))"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


def test_another_attention_implementation_is_refused(with_sink: Path) -> None:
    """It would go on without the quantized cache."""
    model = load(with_sink)
    model.set_attn_implementation("eager")
    with pytest.raises(FPTQuantError, match="'eager' knows no quantized KV cache: set it back with model.set_attn"):
        model(TOKENS)


def test_dynamic_ranges_are_not_shared(with_sink: Path) -> None:
    model = load(with_sink)
    use_dynamic_ranges(model)
    expected = model(TOKENS).logits
    changed = copy.deepcopy(model)
    scales = {name: x.clone() for name, x in model.named_buffers() if name.endswith("input_scale")}
    assert torch.equal(changed(OTHERS[:, :3]).logits, model(OTHERS[:, :3]).logits)
    assert torch.equal(model(TOKENS).logits, expected)
    assert all(torch.equal(model.get_buffer(name), scale) for name, scale in scales.items())
