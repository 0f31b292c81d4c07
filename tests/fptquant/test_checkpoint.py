"""The contract: quantizer arithmetic against plain integers, the packed layout, the schema, publication."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from fptquant.errors import FPTQuantError, is_disk_full
from fptquant.format import (
    CheckpointConfig,
    InputHadamard,
    Override,
    TransformRecord,
    WeightScheme,
    block_hadamard,
    code_bounds,
    exact_attention,
    hadamard_factors,
    match_name,
    pack_codes,
    packed_words,
    quantize,
    quantize_per_tensor,
    quantized_architecture,
    quantized_linear,
    residual_scale,
    round_scale,
    unpack_codes,
)
from fptquant.format.checks import require_consistent
from fptquant.run.publication import Publication

FLOATS = st.floats(-1e6, 1e6, width=32)
SCALES = st.floats(2**-20, 2**10, width=32)


# -- arithmetic --


@given(x=FLOATS, scale=SCALES, bits=st.sampled_from([4, 8]), data=st.data())
def test_quantize_equals_the_integer_formula(x: float, scale: float, bits: int, data: st.DataObject) -> None:
    """clamp(rint(float32(x) / s) + z) - z, in NumPy: IEEE float32 division, half to even, integer zero point."""
    half = 2 ** (bits - 1)
    z = data.draw(st.integers(-half, half - 1))
    rounded = int(np.rint(np.float32(x) / np.float32(scale)))
    expected = min(max(rounded + z, -half), half - 1) - z
    low, high = code_bounds(torch.tensor(z, dtype=torch.int32), bits)
    assert quantize(torch.tensor(x), torch.tensor(scale), low, high).item() == expected
    assert quantize_per_tensor(torch.tensor(x), torch.tensor(scale), float(low), float(high)).item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_even_and_codes_saturate(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 100.0, -100.0, 6.5, 7.5, -8.5], dtype=dtype)
    codes = quantize(x, torch.tensor(1.0), *code_bounds(torch.tensor(0), 4))
    assert codes.dtype == torch.float32
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 7, -8, 6, 7, -8]


def test_division_is_not_a_product_with_the_reciprocal() -> None:
    """3 / 6 is a tie in exact arithmetic; values where x * (1 / s) rounds to the other side must not flip."""
    scale = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.01
    x = scale * (torch.arange(20_000) % 7 + 0.5)  # every quotient within one rounding of a tie
    low, high = code_bounds(torch.tensor(0), 4)
    by_division = quantize(x, scale, low, high)
    by_reciprocal = torch.clamp(torch.round(x * (1 / scale)), low, high)
    assert not torch.equal(by_division, by_reciprocal), "the example no longer tells the two apart"
    expected = np.clip(np.rint(x.numpy() / scale.numpy()), -8, 7)
    assert np.array_equal(by_division.numpy(), expected)


def test_zero_is_exact_for_every_zero_point() -> None:
    for bits in (4, 8):
        for z in range(-(2 ** (bits - 1)), 2 ** (bits - 1)):
            assert quantize(torch.zeros(()), torch.tensor(0.3), *code_bounds(torch.tensor(z), bits)).item() == 0


@given(
    rows=st.integers(1, 5), inner=st.integers(1, 70), outputs=st.integers(1, 6), seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
)  # fmt: skip
def test_quantized_linear_equals_integers(rows: int, inner: int, outputs: int, seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2**bits) + 1, 2**bits, (rows, inner))  # q - z of asymmetric inputs
    weights = rng.integers(-8, 8, (outputs, inner))
    scales = rng.random(outputs, dtype=np.float32)
    expected = (codes @ weights.T).astype(np.float32) * scales
    actual = quantized_linear(torch.tensor(codes).float(), torch.tensor(weights).float(), torch.tensor(scales))
    assert np.array_equal(actual.numpy(), expected)


def test_residual_scale_is_one_over_the_rms() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16)
    expected = [[1 / math.sqrt(12.5 + 0.25)], [2.0]]
    actual = residual_scale(x, 0.25)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected))


@pytest.mark.parametrize("block, blocks", [(1, 3), (2, 1), (4, 5), (8, 7), (32, 3), (128, 1)])
def test_block_hadamard_equals_the_dense_matrix(block: int, blocks: int) -> None:
    dense = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]).double()
    x = torch.randn(2, 3, block * blocks, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ torch.block_diag(*[dense / math.sqrt(block)] * blocks)
    actual = block_hadamard(x, *hadamard_factors(block))
    assert actual.shape == x.shape and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(block_hadamard(actual, *hadamard_factors(block)), x, rtol=0, atol=4e-6)  # involution


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, got 12"):
        hadamard_factors(12)


@pytest.mark.parametrize("new, total", [(5, 5), (1, 7), (3, 7)])
def test_exact_attention_is_causal_attention_in_float64(new: int, total: int) -> None:
    """The last `new` of `total` positions; query head h reads KV head h // 2."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, new, 6, generator=generator)
    key, value = (torch.randn(2, total, 6, generator=generator) for _ in range(2))
    actual = exact_attention(query, key, value, 0.3)
    assert actual.shape == (new, 4, 6) and actual.dtype == torch.float32
    for head in range(4):
        for row in range(new):
            seen = total - new + row + 1
            scores = 0.3 * key[head // 2, :seen].double() @ query[head, row].double()
            expected = torch.softmax(scores, 0) @ value[head // 2, :seen].double()
            torch.testing.assert_close(actual[row, head], expected.float(), rtol=1e-6, atol=1e-7)


# -- packing --


@given(rows=st.integers(1, 4), columns=st.integers(1, 40), bits=st.sampled_from([4, 7, 8]), seed=st.integers(0, 999))
def test_packing_round_trip(rows: int, columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).float()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, -(-columns // (8 if bits == 4 else 4)))
    assert torch.equal(unpack_codes(packed, bits, codes.shape).float(), codes)


def test_packed_layout_by_hand() -> None:
    """Offset binary, lowest nibble first, the last word filled up with zeros."""
    codes = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 4, -1, 5]])
    first = sum((int(c) + 8) << (4 * i) for i, c in enumerate(codes[0, :8]))
    second = (7 << 0) | (13 << 4)
    words = [int(word) & 0xFFFFFFFF for word in pack_codes(codes, 4)[0]]
    assert words[0] == first == 0xCBA9F810
    assert words[1] & 0xFF == second == 0xD7


@pytest.mark.parametrize(
    "bits, codes, expected",
    [
        (4, [-8, -7, 0, 7, 1, 2, 3, 4, -1, 5], "10f8a9cb d7000000"),
        (7, [-64, 63, 0, 1, -1, 42], "803f3008 3f350000"),
        (8, [-128, 127, 0, 1, -1], "00ff8081 7f000000"),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], expected: str) -> None:
    """The bytes of docs/format.md. 7-bit codes are four to a word, as the checkpoints of format version 1 have them."""
    packed = pack_codes(torch.tensor([codes]), bits)
    assert packed.numpy().astype("<i4").tobytes().hex(" ", -4) == expected
    assert unpack_codes(packed, bits, torch.Size((1, len(codes)))).tolist() == [codes]
    assert packed.shape == (1, packed_words(len(codes), bits))


def test_patterns_match_names_from_their_start() -> None:
    assert match_name("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert match_name("model.layers.1.mlp.up_proj", r"re:.*\.mlp") and match_name("lm_head", "re:lm")
    assert not match_name("model.layers.1.mlp.up_proj", "re:mlp") and not match_name("lm_head2", "lm_head")


@given(st.floats(2**-30, 60000, width=32))
def test_round_scale_is_exact_in_both_16_bit_formats(value: float) -> None:
    scale = torch.tensor(value)
    rounded = round_scale(scale)
    assert rounded.dtype == torch.float32 and rounded > 0
    assert rounded.to(torch.bfloat16).float() == rounded and rounded.to(torch.float16).float() == rounded
    spacing = max(2.0**-24, 2.0 ** (math.frexp(value)[1] - 8))  # of the coarser of the two formats
    assert abs(rounded.item() - value) <= max(0.75 * spacing, 2.0**-24)
    assert round_scale(rounded) == rounded


# -- schema --


def test_schema_round_trip() -> None:
    config = CheckpointConfig(overrides=(Override(modules="re:.*down", weights=WeightScheme(bits=8)),))
    assert CheckpointConfig.parse(config.to_dict()) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 3}, "format_version 3, but this package reads up to 2: upgrade"),
        ({"surprise": 1}, "surprise"),
        ({"weights": {"bits": 3}}, "weights.bits"),
        ({"weights": {"group": 128}}, "weights.group"),
        ({"weights": {"strategy": "group"}}, "weights: strategy 'group' and group_size .* belong together"),
        ({"weights": {"group_size": 64}}, "weights: strategy 'group' and group_size .* belong together"),
        ({"weights": {"strategy": "group", "group_size": 48}}, "weights.group_size: Input should be 32, 64 or 128"),
        ({"weights": {"bits": 7, "strategy": "group", "group_size": 64}}, "4-bit weights, not of 7 bits"),
        ({"activations": {"dynamic": True}}, "activations.dynamic"),
        ({"transforms": {"down_hadamard": {"block": 12}}}, "power of two, got 12"),
        ({"transforms": {"input_hadamard": {"qkv": 12}}}, "input_hadamard.qkv: block must be a power of two, got 12"),
        ({"transforms": {"input_hadamard": {"down": 16}}}, "transforms.input_hadamard.down: "),
        ({"transforms": {"later_hadamard": {"qkv": 16}}}, "transforms.later_hadamard: Extra inputs are not permitted"),
        ({"quant_method": "gptq"}, "quant_method"),
    ],
)
def test_schema_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(FPTQuantError, match=message) as caught:
        CheckpointConfig.parse({**CheckpointConfig().to_dict(), **change})
    assert "\n" not in str(caught.value)


def test_an_unused_field_is_not_written() -> None:
    """Checkpoints without T_h, or groups, are what they were before there were any, which older readers read."""
    assert CheckpointConfig().to_dict()["weights"] == {"bits": 4, "symmetric": True, "strategy": "channel"}
    groups = CheckpointConfig(weights=WeightScheme(strategy="group", group_size=64))
    assert groups.to_dict()["weights"] == {"bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
    assert CheckpointConfig.parse(groups.to_dict()) == groups
    assert CheckpointConfig().to_dict()["transforms"] == {
        "merged": [],
        "down_hadamard": None,
        "residual_scale": False,
    }
    config = CheckpointConfig(transforms=TransformRecord(input_hadamard=InputHadamard(qkv=16)))
    assert config.to_dict()["transforms"]["input_hadamard"] == {"qkv": 16, "o": None, "gate_up": None}
    assert CheckpointConfig.parse(config.to_dict()) == config


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"down_hadamard": {"block": 64}}, "down_hadamard.block is 64, which does not divide intermediate_size 96"),
        ({"input_hadamard": {"qkv": 128}}, "input_hadamard.qkv is 128, which does not divide hidden_size 64"),
        ({"input_hadamard": {"gate_up": 128}}, "input_hadamard.gate_up is 128, which does not divide hidden_size 64"),
        ({"input_hadamard": {"o": 64}}, "input_hadamard.o is 64, which does not divide the size of all heads, 96"),
    ],
)
def test_blocks_that_do_not_fill_their_layers_input(transforms: dict[str, object], message: str) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=24, vocab_size=8)
    require_consistent(CheckpointConfig(), config, [96])
    with pytest.raises(FPTQuantError, match=f"^config.json: quantization_config.transforms.{message}: "):
        require_consistent(CheckpointConfig.parse({"transforms": transforms}), config, [96])


def test_scheme_for_a_module() -> None:
    name = "model.layers.1.mlp.down_proj"
    overrides = (
        Override(modules="re:.*down_proj", activations={"bits": 8}),
        Override(modules=name, weights={"bits": 8}),
    )
    config = CheckpointConfig(activations={"bits": 4}, overrides=overrides, ignore=("lm_head", "re:.*layers.9"))
    scheme = config.scheme_for(name)
    assert scheme is not None and (scheme.weights.bits, scheme.activations.bits) == (8, 8)
    other = config.scheme_for("model.layers.2.mlp.down_proj")
    assert other is not None and (other.weights.bits, other.activations.bits) == (4, 8)
    plain = config.scheme_for("model.layers.2.mlp.up_proj")
    assert plain is not None and (plain.weights.bits, plain.activations.bits) == (4, 4)
    assert config.scheme_for("lm_head") is None and config.scheme_for("model.layers.9.mlp.up_proj") is None


def test_quantized_architecture_name() -> None:
    assert quantized_architecture("LlamaForCausalLM") == "FPTQuantLlamaForCausalLM"


# -- publication --


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OLD = json.dumps({"quantization_config": {"quant_method": "fptquant"}})


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(OLD)
    return folder


def test_publishes_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with Publication(target, overwrite=False) as staging:
        (staging / "config.json").write_text("new")
        assert not target.exists()
    assert (target / "config.json").read_text() == "new"
    assert listing(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Publication(tmp_path / "new" / "sub" / "out", overwrite=False) as staging:
        (staging / "part").write_text("x")
        raise error
    assert listing(tmp_path) == []


def test_interrupt_just_after_the_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def interrupted(self: Path, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if ".partial-" in self.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), Publication(tmp_path / "new" / "out", overwrite=False):
        pass
    assert listing(tmp_path) == []


def test_overwrite_replaces_only_when_complete(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "out")
    with pytest.raises(RuntimeError), Publication(target, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        raise RuntimeError
    assert (target / "config.json").read_text() == OLD and listing(tmp_path) == ["out"]
    with Publication(target, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (target / "config.json").read_text() == OLD
    assert (target / "config.json").read_text() == "new" and listing(tmp_path) == ["out"]


def test_existing_target(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "out")
    with pytest.raises(FPTQuantError, match="exists.*--overwrite"):
        Publication(target, overwrite=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    for others in ('{"my": "settings"}', '{"quantization_config": {"quant_method": "gptq"}}', "{", None):
        with pytest.raises(FPTQuantError, match="no checkpoint of fptquant"):
            Publication(tmp_path / "home", overwrite=True)
        (tmp_path / "home" / "config.json").write_text(others or "")
    with pytest.raises(FPTQuantError, match="no checkpoint of fptquant"):
        Publication(tmp_path / "home" / "thesis.tex", overwrite=True)
    with pytest.raises(FPTQuantError, match="not a directory"):
        Publication(tmp_path / "home" / "thesis.tex" / "out", overwrite=False)


def test_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FPTQuantError, match="appeared"), Publication(target, overwrite=False):
        checkpoint(target)
    assert (target / "config.json").read_text() == OLD and listing(tmp_path) == ["out"]


def test_link_to_a_directory(tmp_path: Path) -> None:
    checkpoint(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Publication(tmp_path / "link", overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").read_text() == "new"
    assert listing(tmp_path) == ["link", "real"]


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_killed_runs_are_removed_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    kept = [".out.partial-notes", f".out.partial-{os.getppid()}", f".other.partial-{dead_process()}"]
    # The own number can only be left over: in a container every run has the same one.
    for name in [
        *kept,
        f".out.partial-{dead_process()}",
        f".out.partial-{os.getpid()}",
        f".out.partial-old-{dead_process()}",
    ]:
        checkpoint(tmp_path / name)
    checkpoint(tmp_path / "out")
    with Publication(tmp_path / "out", overwrite=True):
        pass
    assert listing(tmp_path) == sorted([*kept, "out"])


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A number that a process got after the folder was made says nothing."""
    for name in (f".out.partial-{dead_process()}", f".out.partial-{os.getpid()}"):
        checkpoint(tmp_path / name)
    publication = Publication(tmp_path / "out", overwrite=False)
    publication.require_alone()
    other = checkpoint(tmp_path / f".out.partial-{os.getppid()}")
    with pytest.raises(FPTQuantError, match=f"process {os.getppid()} is writing .*remove '{re.escape(str(other))}'"):
        publication.require_alone()
    os.utime(other, (0, 0))
    publication.require_alone()


def test_mount_points_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(FPTQuantError, match="is a mount point.*choose a directory inside it"):
            Publication(tmp_path / "out", overwrite=overwrite)


def test_old_checkpoint_returns_when_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, moved = checkpoint(tmp_path / "out"), Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path.name == f".out.partial-{os.getpid()}":
            raise OSError(errno.EBUSY, "busy")
        return moved(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="busy"), Publication(target, overwrite=True):
        pass
    assert (target / "config.json").read_text() == OLD and listing(tmp_path) == ["out"]


def test_target_moved_aside_by_a_killed_run_returns(tmp_path: Path) -> None:
    """A kill between "old away" and "new there" must not cost the old one."""
    checkpoint(tmp_path / f".out.partial-old-{dead_process()}")
    with pytest.raises(FPTQuantError, match="exists"):
        Publication(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "config.json").read_text() == OLD


def test_odd_target_names(tmp_path: Path) -> None:
    for name in ("[a]*?", "with space", ".hidden", "a-1"):
        with Publication(tmp_path / name, overwrite=False) as staging:
            (staging / "config.json").write_text("x")
        assert (tmp_path / name / "config.json").is_file()
    assert len(listing(tmp_path)) == 4


def test_space_is_checked_before(tmp_path: Path) -> None:
    publication = Publication(tmp_path / "not" / "yet" / "out", overwrite=False)
    free = shutil.disk_usage(tmp_path).free
    publication.require_space(free // 2)
    with pytest.raises(FPTQuantError, match=r"MB free, but the checkpoint and the run's state need about .* MB"):
        publication.require_space(free * 2)
    assert listing(tmp_path) == []


def test_space_of_what_killed_runs_left_is_free(tmp_path: Path) -> None:
    """It goes when the run begins."""
    free = shutil.disk_usage(tmp_path).free
    for process in (dead_process(), os.getppid()):
        left = tmp_path / f".out.partial-{process}"
        left.mkdir()
        with (left / "model.safetensors").open("wb") as file:
            file.truncate(2 * free)  # takes no space
    publication = Publication(tmp_path / "out", overwrite=False)
    publication.require_space(2 * free)
    with pytest.raises(FPTQuantError, match="MB free"):
        publication.require_space(4 * free)  # the other run's stays
    with publication as staging:
        with (staging / "model.safetensors").open("wb") as file:
            file.truncate(2 * free)
        with pytest.raises(FPTQuantError, match="MB free"):
            publication.require_space(2 * free)  # that is of the run itself


def test_disk_full_is_recognized() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "x")) and is_disk_full(OSError(errno.EDQUOT, "x"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "x")) and not is_disk_full(RuntimeError("os error 2"))
