"""What each quantized layer of a checkpoint becomes in an export, and what can't be kept; nothing is read.

Stock vLLM multiplies integers in one form, W8A8: `int-quantized` weights of 8 bits with a scale for each output
channel, inputs with one static scale or one for each token. Codes of 4 and 7 bits, and the products of codes with the
multipliers of groups, fit into 8 bits unchanged. Weights alone are `pack-quantized`, in 4 or 8 bits.

A scale for each token takes the factor S of S_n in, exactly: what is quantized in steps of its own largest value
doesn't depend on what it is multiplied by. So the two layers of a block that S_n scales get such scales. All layers
get them where the first token was constant: static ranges were made without what it puts into them.

Static inputs have a zero point, be it 0: without one, vLLM's kernel for CPUs with AMX takes a scale for each token in
place of the static one. Scales for each token come without, as most models with such have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fptquant.errors import FPTQuantError
from fptquant.export.formats import COMPRESSED_TENSORS, FLOAT
from fptquant.format import CheckpointConfig
from fptquant.format.steps import Hadamard, arrange
from fptquant.schemes import LinearScheme
from fptquant.wiring import Architecture

Online = Literal["undo", "keep"]
Inputs = Literal["float", "static", "dynamic"]


@dataclass(frozen=True)
class StockLayer:
    """A linear layer as stock vLLM has it.

    Attributes:
        scheme: what it is in our format.
        bits: of its stored weights: 8 in integers of their own, 4 or 8 packed where inputs are float; 16 in float.
        inputs: how they are quantized.
        block: of an online Hadamard in front of it that stays there; None without.
        undone: block of one that its weights take in, None without.
    """

    scheme: LinearScheme
    bits: Literal[4, 8, 16]
    inputs: Inputs
    block: int | None = None
    undone: int | None = None

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale of the weights; None for all of a channel."""
        return self.scheme.weights.group_size if self.bits == 4 else None


@dataclass(frozen=True)
class Plan:
    """An export.

    Attributes:
        format: one of `fptquant.export.formats`.
        layers: by full name, what becomes of the quantized ones.
        floats: full names of the linear layers that were in floating point.
        losses: what can't be kept, and what stands in its place, for users to read.
    """

    format: str
    layers: Mapping[str, StockLayer]
    floats: tuple[str, ...]
    losses: tuple[str, ...]

    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind, in words."""
        found: dict[str, int] = {}
        for layer in self.layers.values():
            if layer.bits == 16:
                kind = "floating point"
            elif layer.inputs == "float":
                groups = "" if layer.group_size is None else f" in groups of {layer.group_size}"
                kind = f"INT{layer.bits} weights{groups}, packed"
            else:
                kind = "INT8 weights, " + ("inputs scaled by token" if layer.inputs == "dynamic" else "static inputs")
            found[kind] = found.get(kind, 0) + 1
        return found


def make_plan(
    config: CheckpointConfig,
    architecture: Architecture,
    layers: int,
    *,
    format: str = COMPRESSED_TENSORS,
    online: Online = "undo",
) -> Plan:
    """Decides what becomes of each layer.

    Args:
        config: of the checkpoint.
        architecture: its family.
        layers: how many decoder layers there are.
        format: of the export.
        online: whether Hadamards in front of layers stay there, or weights take them in.

    Raises:
        FPTQuantError: something that has no form in that format.
    """
    if architecture.mixtures:
        raise FPTQuantError("export: mixtures of experts aren't exported: serve the checkpoint with the plugin")
    names = [
        *(architecture.projection_name(i, item) for i in range(layers) for item in architecture.projections_of(i)),
        architecture.head,
    ]
    schemes = {name: scheme for name in names if (scheme := config.scheme_for(name)) is not None}
    if not schemes:
        raise FPTQuantError("export: no layer of this checkpoint is quantized: there is nothing to export")
    for name, scheme in schemes.items():
        if scheme.activations.bits == 4 and format == COMPRESSED_TENSORS:
            raise FPTQuantError(
                f"export: {name} has 4-bit activations, which stock vLLM has no static form of (with 8 bits their "
                "ranges would no longer clip, so other values would come out): quantize at w4a8 or w4a16 to export, "
                "or serve this checkpoint with the plugin"
            )
    found = {name: _layer(config, name, scheme, format, online) for name, scheme in schemes.items()}
    floats = tuple(name for name in names if name not in schemes)
    return Plan(format, found, floats, tuple(_losses(config, found, format)))


def _layer(config: CheckpointConfig, name: str, scheme: LinearScheme, format: str, online: Online) -> StockLayer:
    steps = arrange(config.steps_for(name), name)
    blocks = [step.block for step in steps.inputs if isinstance(step, Hadamard)]
    if len(blocks) != len(steps.online) or len(blocks) > 1:
        raise FPTQuantError(f"export: {name} has online steps that stock vLLM doesn't know: serve it with the plugin")
    block = blocks[0] if blocks else None
    undone = block if online == "undo" else None
    if format == FLOAT:
        return StockLayer(scheme, 16, "float", undone=block)
    if scheme.activations.bits == 16:
        stored: Literal[4, 8, 16] = 16 if undone else 4 if scheme.weights.bits == 4 else 8
        return StockLayer(scheme, stored, "float", None if undone else block, undone)
    dynamic = bool(undone) or steps.scaled or config.sink is not None
    return StockLayer(scheme, 8, "dynamic" if dynamic else "static", None if undone else block, undone)


def _losses(config: CheckpointConfig, layers: Mapping[str, StockLayer], format: str) -> Iterable[str]:
    """Sentences, each of what is lost and what takes its place."""
    found = layers.values()
    quantized = [layer for layer in found if layer.inputs != "float"]
    if format == FLOAT:
        yield "integers: weights are what codes and scales stand for, in floating point, and inputs are not quantized"
    if config.kv_cache.bits < 16:
        yield (
            f"INT{config.kv_cache.bits} KV cache: stock vLLM has none with static integers, so keys and values stay in "
            "floating point (more memory for each token, no loss of accuracy)"
        )
    if config.sink is not None:
        yield (
            "constant first token: what it puts into the cache comes from quantized weights instead, which weren't "
            "fitted to it; this costs accuracy (see what was measured), and checkpoints made with `sink: none` or a KV "
            "cache in floating point (w4a8, w4a16) have nothing to lose here"
        )
    if config.sink is not None and quantized:
        yield "static ranges: every input gets a scale for each token, as ranges were made without the first token"
    if config.transforms.residual_scale and quantized:
        yield "S_n: o_proj and down_proj get a scale for each token, which takes the place of S_n and of a static range"
    if any(layer.undone and layer.inputs != "float" for layer in found):
        yield (
            f"online Hadamards in front of {_kinds(layers, undone=True)}: undone in the weights, which are rounded "
            "again to 8 bits, and inputs get a scale for each token (--online keep leaves them where they are)"
        )
    if any(layer.undone and layer.inputs == "float" for layer in found) and format != FLOAT:
        yield (
            f"online Hadamards in front of {_kinds(layers, undone=True)}: undone in the weights, which are in floating "
            "point then (--online keep leaves them where they are)"
        )
    if any(layer.block for layer in found):
        yield (
            f"online Hadamards in front of {_kinds(layers, undone=False)} are left to vLLM, which computes them in 16 "
            "bits, on one GPU; CPUs can't, --tensor-parallel-size neither, and transformers leaves them out: it "
            "computes something else with this export"
        )
    if quantized and any(layer.scheme.weights.bits < 8 for layer in quantized):
        yield "4-bit and 7-bit codes are in 8-bit integers, with unchanged values: twice the memory of 4 bits"
    if any(layer.group_size for layer in found):
        yield "scales of groups are rounded where a model is served in bfloat16 (its 8 bits; float16 holds them)"
    yield "exactness: stock kernels round where they like, so values equal ours up to floating point and single codes"
    yield "binding, digests and recorded logits: nobody but fptquant reads them, so a damaged file is not noticed"


def _kinds(layers: Mapping[str, StockLayer], *, undone: bool) -> str:
    """Last parts of the names of the layers with such Hadamards."""
    names = (name for name, layer in layers.items() if (layer.undone if undone else layer.block))
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
