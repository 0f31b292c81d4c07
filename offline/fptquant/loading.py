"""Opening a source model: everything that can be wrong with it is found before any long work."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fptquant import hf_quantizer as _hf_quantizer  # noqa: F401  (registers on import)
from fptquant.devices import CPU
from fptquant.errors import FPTQuantError, is_out_of_memory
from fptquant.files import ADAPTER_FILES, first_line, read_json, require_model
from fptquant.format import QUANT_METHOD, CheckpointConfig
from fptquant.format.binding import BINDING, UNBOUND, Binding, Watch
from fptquant.format.checks import require_consistent
from fptquant.format.schema import EXTRAS, MODEL_TYPE_PREFIX
from fptquant.hf_quantizer import require_tensors
from fptquant.layers.ahead import ReadAhead, Stored
from fptquant.layers.residency import Residency, make_part, put_buffers, set_tensors
from fptquant.read_as import as_family
from fptquant.simulate.install import drop_quantized_weights, finish_loading, install_simulation
from fptquant.simulate.mixture import separate_projections
from fptquant.simulate.recorded import FILE as RECORDED_LOGITS
from fptquant.simulate.recorded import require_recorded
from fptquant.simulate.sink import use_sink
from fptquant.weight_files import DTYPES, StoredTensor, WeightFiles
from fptquant.wiring import FAMILIES, Architecture
from fptquant.wiring.lookup import architecture_of, check_model_type

# What `from_pretrained` needs and nothing that could execute code or duplicates the weights in another format.
_NEEDED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_HUB_PATTERNS = [*_NEEDED, "README.md", "LICENSE*"]  # for the model card
_HUB_DUPLICATES = ["consolidated*", "original/*"]
_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
# Not weights: buffers that older versions of transformers stored, and computes itself today.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
_log = logging.getLogger(__name__)
_ROWS = 1024  # of a matrix that are in float64 at a time
_PEEK = 4096  # values, of which one is not 0 in almost every matrix


@dataclass(frozen=True)
class Source:
    """A checked Hugging Face checkpoint directory."""

    path: Path
    config: PretrainedConfig
    architecture: Architecture
    tokenizer: Tokenizer
    weights: WeightFiles
    stored_dtype: torch.dtype  # of the weights; float32 where they have several
    names: Mapping[str, str]  # the model's names of its tensors -> those in the files; empty where it is quantized
    device: torch.device  # where its models are
    factors: Mapping[str, float] = field(default_factory=dict)  # by the model's names, of what takes multipliers in
    notes: tuple[str, ...] = ()  # what is odd and may be meant, for the user to read
    kind: str = ""  # class of the model, for the user to read

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that config.json names; where it names none, that of the stored weights."""
        named = getattr(self.config, "dtype", None)
        return named if isinstance(named, torch.dtype) else self.stored_dtype

    @property
    def quantized(self) -> bool:
        """Whether this is quantized, by us or by another tool."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def ours(self) -> bool:
        """Whether this is a checkpoint in our format."""
        return quantized_by_us(self.config)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights of an unquantized model by the model's names, float32, on the device; with multipliers taken in.

        Raises:
            FPTQuantError: a file is gone, or holds values that aren't finite.
        """
        wanted = {name: self.names[name] for name in names}
        return self._taken(wanted, self.weights.read(dict.fromkeys(wanted.values())))

    def read_part(self, part: str) -> dict[str, Tensor]:
        """`read` of all tensors of a part of the model (`parts`), by their names within it."""
        return _within(part, self.read(_named(part, self.names)))

    def layer_reader(self) -> Callable[[int], dict[str, Tensor]]:
        """A `read_part` of the decoder layers by index; for an accelerator, the next one is read ahead."""
        layers = [self.architecture.layer_name(index) for index in range(self.architecture.shape(self.config).layers)]
        wanted = [{name: self.names[name] for name in _named(layer, self.names)} for layer in layers]

        def stored(index: int) -> Stored:
            tensors = self.weights.read(wanted[index].values())
            return [(name, tensor.pin_memory() if self.device.type == "cuda" else tensor) for name, tensor in tensors]

        ahead = None if self.device == CPU else ReadAhead(stored, len(layers))

        def read(index: int) -> dict[str, Tensor]:
            tensors = self.weights.read(wanted[index].values()) if ahead is None else _popped(ahead(index))
            return _within(layers[index], self._taken(wanted[index], tensors))

        return read

    def _taken(self, wanted: Mapping[str, str], stored: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors as models have them, by the names in `wanted`; raises FPTQuantError where one isn't finite."""
        found: dict[str, Tensor] = {}
        for name, tensor in stored:
            found[name] = tensor.to(self.device, non_blocking=True).float()  # it waits where memory isn't pinned
            if not bool(torch.stack(torch.aminmax(found[name])).isfinite().all()):  # NaN is both
                raise FPTQuantError(f"'{self.path}': {name} holds NaN or infinite values: fetch the model again")
        return {
            name: _multiplied(found[file_name], self.factors[name]) if name in self.factors else found[file_name]
            for name, file_name in wanted.items()
        }

    def fingerprint(self) -> str:
        """Short hash by which a model is known again: its configuration and its weights."""
        found = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.weights.files:
            with file.open("rb") as stream:
                found.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()[:16]

    def require_length(self, setting: str, length: int, generated: int = 0) -> None:
        """Refuses sequences of `length` tokens, `generated` ones apart, that the model has no positions for.

        Raises:
            FPTQuantError: names the setting and the limit.
        """
        limit = self.config.max_position_embeddings - generated
        if length > limit:
            reserved = f", less {generated} that vLLM generates" if generated else ""
            raise FPTQuantError(
                f"{setting}: {length} tokens are more than the {limit} that the model has positions for "
                f"(max_position_embeddings in its config.json{reserved}): lower it to {limit} or less"
            )


def _named(part: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{part}.")]


def _within(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def _popped(items: Stored) -> Iterator[tuple[str, Tensor]]:
    """The items, each let go of with the next."""
    while items:
        yield items.pop()


def quantized_by_us(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a checkpoint in our format."""
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def open_source(name: str | Path, *, device: torch.device = CPU, trust_remote_code: bool = False) -> Source:
    """Checks a model directory (or fetches it from the hub) without loading its weights.

    Args:
        name: directory, or name on the hub.
        device: for its models.
        trust_remote_code: as transformers takes it.

    Raises:
        FPTQuantError: not a model, unknown architecture, damaged weight file, missing tokenizer.
    """
    path = _local_directory(str(name))
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise FPTQuantError(f"'{path}' is no model: it has no config.json")
    described = read_json(path / "config.json")
    check_model_type(described)
    if described.get("transformers_weights") is not None:
        raise FPTQuantError(
            f"{path / 'config.json'}: transformers_weights names another weight file, which only transformers would "
            "read: call it model.safetensors, and remove that field"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds, all of them the file's fault
        raise FPTQuantError(f"{path / 'config.json'}: {first_line(error)}") from None
    found = as_family(config, described, WeightFiles.of(path))
    config, weights, notes = found.config, found.weights, list(found.notes)
    architecture = architecture_of(config)
    if architecture.shape(config).layers < 1:
        raise FPTQuantError(f"{path / 'config.json'} describes a model without layers")
    quantization = getattr(config, "quantization_config", None)
    stored, names, factors = torch.float32, dict[str, str](), dict[str, float]()
    if quantization is None:
        stored, names, odd = _check_tensors(config, weights)
        notes += odd
        config, factors = without_multipliers(config, architecture)
    elif quantized_by_us(config):
        weights.require_alone()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise FPTQuantError(
            f"'{path}' has no usable tokenizer ({first_line(error)}): copy tokenizer.json and "
            "tokenizer_config.json of the original model into it"
        ) from None
    if not len(tokenizer):
        raise FPTQuantError(f"'{path}' has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it")
    kind = found.kind + architecture.class_name
    return Source(path, config, architecture, tokenizer, weights, stored, names, device, factors, tuple(notes), kind)


def without_multipliers(
    config: PretrainedConfig, architecture: Architecture
) -> tuple[PretrainedConfig, dict[str, float]]:
    """The configuration of the same model without multipliers, and the factors by which its weights take them in.

    A head that was tied isn't any more: it has another factor than the embedding.

    Raises:
        FPTQuantError: a multiplier is no positive number.
    """
    if not architecture.multipliers:
        return config, {}
    for name in architecture.multipliers:
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise FPTQuantError(f"config.json: {name} is {value}, must be positive and finite: correct it")
    factors, config = architecture.factors(config), copy.deepcopy(config)
    for name in architecture.multipliers:
        setattr(config, name, architecture.neutral(config, name))
    config.tie_word_embeddings = False
    return config, factors


def _multiplied(tensor: Tensor, factor: float) -> Tensor:
    """`tensor` times `factor`, in float64 and rounded once; some rows at a time."""
    result = torch.empty_like(tensor)
    for target, rows in zip(torch.split(result, _ROWS), torch.split(tensor, _ROWS), strict=True):
        target.copy_(rows.double() * factor)
    return result


def load_model(source: Source, *, residency: Residency = "resident", recorded: bool = True) -> PreTrainedModel:
    """A model in float32 on its device, ready for evaluation (a quantized checkpoint becomes its simulation).

    Args:
        source: what to load.
        residency: whether all of it is in memory, or its layers are read when they are entered; what another tool
            quantized always is in memory.
        recorded: compare the logits of a quantized checkpoint with those that were recorded when it was written.

    Raises:
        FPTQuantError: the weights can't be read, or aren't what was written.
    """
    if not source.quantized:
        return _original(source, residency)
    loaded = _streamed_checkpoint(source) if source.ours and residency == "streamed" else _quantized(source)
    file = source.path / EXTRAS / RECORDED_LOGITS
    if recorded and file.is_file():
        require_recorded(loaded, file)
    return loaded


def _original(source: Source, residency: Residency) -> PreTrainedModel:
    model = skeleton(source.config)
    put_buffers(model, source.device)
    found = parts(model, source.architecture)
    for name, module in found.items():

        def fill(module: nn.Module, name: str = name) -> None:
            set_tensors(module, source.read_part(name))

        if residency == "streamed":
            make_part(module, fill, residency)
        else:
            fill(module)
    set_tensors(model, source.read(outside(found, source.names)))
    if residency == "resident":
        model.tie_weights()
    return model


def _streamed_checkpoint(source: Source) -> PreTrainedModel:
    """A quantized checkpoint whose layers are read when they are entered; checked as its quantizer does."""
    config = CheckpointConfig.parse(source.config.quantization_config)
    model, stored = skeleton(source.config), source.weights
    binding = Binding.of_files(stored.files)
    if Watch(binding).require_bound(model.config, config, all_of_them=binding is None) is False:
        _log.warning(UNBOUND, source.path)
    require_consistent(config, model.config, source.architecture.shape(model.config).widths)
    install_simulation(model, source.architecture, config)
    drop_quantized_weights(model)
    put_buffers(model, source.device)
    require_tensors(model, stored)

    names = {name: name for name in stored.tensors if name != BINDING} | model.all_tied_weights_keys

    def read(wanted: Iterable[str]) -> dict[str, Tensor]:
        by_stored_name = {names[name]: name for name in wanted}
        found = {}
        for name, tensor in Watch(binding)(stored.read(by_stored_name)):
            tensor = tensor.to(source.device)
            found[by_stored_name[name]] = tensor.float() if tensor.is_floating_point() else tensor
        return found

    found = parts(model, source.architecture)
    for name, module in found.items():

        def fill(module: nn.Module, part: str = name) -> None:
            set_tensors(module, _within(part, read(_named(part, names))))
            finish_loading(module)

        make_part(module, fill, "streamed")
    set_tensors(model, read(outside(found, names)))
    if config.sink is not None:
        use_sink(model)
    return model


def parts(model: PreTrainedModel, architecture: Architecture) -> dict[str, nn.Module]:
    """What is read and let go of as one, by name, in the order of a forward pass: embedding, decoder layers, head."""
    layers = (architecture.layer_name(index) for index in range(len(architecture.layer_modules(model))))
    return {name: model.get_submodule(name) for name in (architecture.embedding, *layers, architecture.head)}


def outside(parts: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the tensors' `names` that belong to none of the parts, as the final norm's."""
    prefixes = tuple(f"{part}." for part in parts)
    return [name for name in names if not name.startswith(prefixes)]


def _quantized(source: Source) -> PreTrainedModel:
    """A quantized checkpoint, ours or another tool's, as transformers loads it."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=torch.float32, output_loading_info=True, **attention_for(source.config)
        )
    except FPTQuantError:
        raise
    except (SafetensorError, RuntimeError, ValueError, ImportError) as error:  # ImportError: quantized by another tool
        if is_out_of_memory(error):
            raise
        raise FPTQuantError(f"'{source.path}': the weights can't be loaded: {first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random values
        raise FPTQuantError(
            f"'{source.path}' lacks {len(missing)} weights, the first is {missing[0]}: fetch the model again"
        )
    if not source.ours:  # ours were looked through on their way in
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FPTQuantError(f"'{source.path}': {name} holds NaN or infinite values: fetch the model again")
    if hasattr(model, "ct_decompress_hook"):  # on the whole model, of which some only run parts
        model.hf_quantizer.compressor.decompress_model(model)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded if source.device == CPU else loaded.to(source.device)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose parameters are on the meta device; what it computes from its configuration, as RoPE does, is there.

    Args:
        config: of any family; it is copied.

    Raises:
        FPTQuantError: it describes no model.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, **attention_for(config)
            )
        separate_projections(model, architecture_of(config))
    except Exception as error:  # an impossible configuration fails in many ways
        raise FPTQuantError(f"config.json describes no model: {type(error).__name__}: {first_line(error)}") from None
    return model.eval().requires_grad_(False)


def attention_for(config: PretrainedConfig) -> dict[str, str]:
    """Arguments of `from_pretrained` for an attention that bounds scores where the family does: sdpa doesn't."""
    family = FAMILIES.get(config.model_type.removeprefix(MODEL_TYPE_PREFIX))
    capped = family is not None and family.caps(config)[0] is not None
    return {"attn_implementation": "eager"} if capped else {}


def _check_tensors(config: PretrainedConfig, weights: WeightFiles) -> tuple[torch.dtype, dict[str, str], list[str]]:
    """Compares the tensors of an unquantized model with what its configuration asks for.

    transformers would replace missing ones by random values.

    Returns:
        Dtype of the weights (float32 where they have several), the stored name of each of the model's, and notes for
        the user.
    """
    path, named = weights.directory, getattr(config, "dtype", None)
    if isinstance(named, torch.dtype) and named not in _FLOATS.values():
        known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _FLOATS.values()))
        raise FPTQuantError(f"{path / 'config.json'}: no model is computed in dtype {named}; known: {known}")
    try:
        model = skeleton(config)
    except FPTQuantError as error:
        raise FPTQuantError(f"{path}: {error}") from None
    tied: Mapping[str, str] = model.all_tied_weights_keys
    used: dict[str, str] = {}  # the model's name -> the stored one, without the prefix in files of base models
    architecture = architecture_of(config)
    for name, tensor in model.state_dict().items():
        in_files = architecture.stored_name(name)
        candidates = dict.fromkeys((in_files, in_files.removeprefix(f"{model.base_model_prefix}.")))
        stored = [candidate for candidate in candidates if candidate in weights]
        if len(stored) > 1:
            raise FPTQuantError(f"'{path}' holds both {stored[0]} and {stored[1]}, for one weight: remove one")
        if stored:
            _check_stored(stored[0], weights.tensors[stored[0]], list(tensor.shape))
            used[name] = stored[0]
        elif name not in tied:
            raise FPTQuantError(f"'{path}' lacks the tensor {in_files}: {_remedy(weights)}")
    for name, original in tied.items():
        used.setdefault(name, used[original])
    names = set(used.values())
    contents = {name: tensor for name, tensor in weights.items() if name in names}  # mapped, not read
    for name, original in tied.items():
        if used[name] != used[original] and not torch.equal(contents[used[name]], contents[used[original]]):
            raise FPTQuantError(
                f"'{path}': config.json ties {name} to {original}, but both are stored, with different values: remove "
                f"{used[name]}, or set tie_word_embeddings to false"
            )
    types = sorted({weights.tensors[name].dtype for name in names})
    stored_dtype = _FLOATS[types[0]] if len(types) == 1 and types != ["F64"] else torch.float32
    notes = _notes(type(model).__name__, weights, contents)
    if len(types) > 1 and getattr(config, "dtype", None) is None:
        notes.append(f"config.json names no dtype and weights are stored as {', '.join(types)}: taken as float32")
    return stored_dtype, used, notes


def _notes(kind: str, weights: WeightFiles, used: Mapping[str, Tensor]) -> list[str]:
    """What is odd about the tensors of a model of class `kind`, and may be meant."""
    notes = []
    unknown = sorted(name for name in weights.tensors.keys() - used.keys() if not _COMPUTED.search(name))
    if unknown:
        notes.append(f"a {kind} has no place for {_count(unknown, 'tensor', 'tensors')}: left out")
    zero = sorted(name for name, tensor in used.items() if tensor.dim() > 1 and _is_zero(tensor))
    if zero:
        notes.append(f"all values are 0 in {_count(zero, 'weight matrix', 'weight matrices')}")
    return notes


def _count(names: list[str], one: str, many: str) -> str:
    return f"the {one} {names[0]}" if len(names) == 1 else f"{len(names)} {many}, the first is {names[0]}"


def _check_stored(name: str, stored: StoredTensor, shape: list[int]) -> None:
    if list(stored.shape) != shape:
        raise FPTQuantError(
            f"'{stored.file.parent}': {name} has shape {list(stored.shape)}, but config.json asks for {shape}: "
            "weights and config.json do not belong together"
        )
    if stored.dtype not in _FLOATS:
        raise FPTQuantError(
            f"'{stored.file}': {name} is stored as {stored.dtype}, so it is quantized already: give the original model"
        )


def _remedy(weights: WeightFiles) -> str:
    """For a tensor that isn't there."""
    fused = sorted(name for name in weights.tensors if name.endswith("experts.gate_up_proj"))
    if fused:
        return f"{fused[0]} holds all experts: load the model with transformers and save it again, expert by expert"
    integer = sorted(name for name, tensor in weights.tensors.items() if tensor.dtype not in _FLOATS)
    if integer:
        return f"{integer[0]} looks quantized, but config.json has no quantization_config: give the original model"
    return "fetch the model again"


def _is_zero(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return not bool(flat[:_PEEK].any()) and not bool(flat.any())


def _refuse_adapter(path: Path) -> None:
    """Transformers applies an adapter where peft is installed, and nobody else does."""
    for name in ADAPTER_FILES:
        if (path / name).exists():
            raise FPTQuantError(
                f"'{path / name}' is of an adapter: merge it into its model first (peft's merge_and_unload) and save "
                "that; where it has nothing to do with the model, remove it"
            )


def _local_directory(name: str) -> Path:
    path = require_model(name)
    if path is not None:
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_DUPLICATES))
    except Exception as error:  # network, authorization, no such repository: all have the same remedy
        raise FPTQuantError(
            f"'{name}' is no local directory and could not be fetched from the hub: {first_line(error)}"
        ) from None
