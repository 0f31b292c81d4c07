"""An export as stock vLLM computes it, in plain torch: read from the exported files, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.export.plan import Plan, StockLayer
from fptquant.export.tensors import LARGEST
from fptquant.format import code_bounds, quantize, quantized_linear, unpack_codes
from fptquant.format.steps import Hadamard
from fptquant.layers.residency import Residency, make_part, put_buffers, set_tensors
from fptquant.loading import Source, outside, parts, skeleton


class StockLinear(nn.Module):
    """A quantized layer of an export; `load` gives it its tensors."""

    def __init__(self, linear: nn.Linear, layer: StockLayer) -> None:
        """Makes a layer without weights, of the sizes of a float one."""
        super().__init__()
        self.layer, self.shape = layer, torch.Size((linear.out_features, linear.in_features))
        self.weight_scale: Tensor  # (N, 1), where inputs are quantized
        self.input_scale: Tensor
        self.input_zero_point: Tensor
        self.codes: Tensor  # (N, K) float32: integers, or their products with their scales where inputs are float
        self.bias: Tensor | None
        for name in ("weight_scale", "input_scale", "input_zero_point", "codes", "bias"):
            self.register_buffer(name, None)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the exported tensors, by their names behind the layer's."""
        self.bias = tensors["bias"].float() if "bias" in tensors else None
        scale = tensors["weight_scale"]
        if self.layer.inputs == "float":
            codes = unpack_codes(tensors["weight_packed"], self.layer.bits, self.shape).float()
            self.codes = codes * scale.repeat_interleave(self.shape[1] // scale.shape[1], 1)
            return
        self.codes, self.weight_scale = tensors["weight"].float(), scale
        if self.layer.inputs == "static":
            self.input_scale, self.input_zero_point = tensors["input_scale"], tensors["input_zero_point"]

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., K). Returns: (..., N) float32."""
        if self.layer.block is not None:
            x = Hadamard(self.layer.block).bind({}, x.device, exact=False)(x)
        if self.layer.inputs == "float":
            y = nn.functional.linear(x.float(), self.codes)
        else:
            codes, scale = self._quantized(x.float())
            y = quantized_linear(codes, self.codes, scale * self.weight_scale.flatten())
        return y if self.bias is None else y + self.bias

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes of x (..., K), and their scale: (..., 1) for each token, or (1,)."""
        if self.layer.inputs == "static":
            scale = self.input_scale
            return quantize(x, scale, *code_bounds(self.input_zero_point, 8)), scale
        scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        return quantize(x, scale, *code_bounds(torch.zeros_like(scale), 8)), scale


def stock_simulation(source: Source, plan: Plan, *, residency: Residency = "resident") -> PreTrainedModel:
    """The model of an export, in float32 but for what is quantized.

    Args:
        source: the exported directory, opened.
        plan: it was exported by.
        residency: whether all of it is in memory, or its layers are read when they are entered.
    """
    model = skeleton(source.config)
    put_buffers(model, source.device)
    for name, layer in plan.layers.items():
        if layer.bits < 16:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, StockLinear(linear, layer))
    files = source.weights
    names = {name: name for name in files.tensors} | model.all_tied_weights_keys

    def read(wanted: Iterable[str]) -> dict[str, Tensor]:
        by_stored_name = {names[name]: name for name in wanted}
        return {by_stored_name[name]: tensor.to(source.device) for name, tensor in files.read(by_stored_name)}

    found = parts(model, source.architecture)
    for part, module in found.items():

        def fill(module: nn.Module, part: str = part) -> None:
            _load(module, part, read(name for name in names if name.startswith(f"{part}.")))

        make_part(module, fill, residency)
    set_tensors(model, {name: tensor.float() for name, tensor in read(outside(found, names)).items()})
    return model


def _load(module: nn.Module, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Gives a part its tensors, by their full names."""
    within = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}
    for path, owner in module.named_modules():
        if isinstance(owner, StockLinear):
            prefix = f"{path}." if path else ""
            own = {name.removeprefix(prefix): name for name in within if name.startswith(prefix)}
            owner.load({name: within.pop(full) for name, full in own.items()})
    set_tensors(module, {name: tensor.float() for name, tensor in within.items()})
