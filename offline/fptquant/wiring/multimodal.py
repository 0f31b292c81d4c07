"""What a multimodal family has to tell: what its text part is, and under what names that is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Multimodal:
    """A family of which the text part is read, quantized and served, as a model of one of the others.

    Attributes:
        model_type: in config.json.
        name: what its classes in transformers begin with, "Mistral3".
        models: known ones, for users to read.
        texts: by the model_type of `text_config`, that of the family whose function on text it has; the first is that
            of a `text_config` that names none.
        stored: beginnings of the names of text's tensors in files, and what they are in the family; the first counts.
        others: beginnings of the names of all other tensors; they count before those of text.
        only_text: fields of `text_config` that have to be off, as the multimodal class leaves them out of account.
        rope: keys of RoPE's parameters that make no difference between tokens of text.
    """

    model_type: str
    name: str
    models: str
    texts: Mapping[str, str]
    stored: Mapping[str, str]
    others: tuple[str, ...]
    only_text: tuple[str, ...] = ()
    rope: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """Name of the model's class in transformers."""
        return f"{self.name}ForConditionalGeneration"

    def text_of(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of the content of a config.json that describes the text part; its model_type always is there."""
        text = config.get("text_config")
        if not isinstance(text, Mapping):  # early Qwen2-VL has its fields beside all others
            text = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
        return {"model_type": next(iter(self.texts)), **text}

    def name_of(self, stored: str) -> str | None:
        """The family's name of a tensor in the files: None where it isn't text's, its own where it isn't known."""
        if stored.startswith(self.others):
            return None
        for before, after in self.stored.items():
            if stored.startswith(before):
                return after + stored.removeprefix(before)
        return stored


_LLAVA = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.", "model.language_model.": "model."}
_LLAVA_OTHERS = tuple(
    f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)
_QWEN = {"model.language_model.": "model."}  # else as in a Qwen2
_QWEN_OTHERS = ("visual.", "model.visual.")

LLAVA = Multimodal(
    model_type="llava",
    name="Llava",
    models="LLaVA 1.5, Pixtral 12B",
    texts={"llama": "llama", "mistral": "mistral"},
    stored=_LLAVA,
    others=_LLAVA_OTHERS,
)
MISTRAL3 = Multimodal(
    model_type="mistral3",
    name="Mistral3",
    models="Mistral Small 3.1 and 3.2, Ministral 3",
    texts={"mistral": "mistral", "ministral3": "ministral3"},
    stored=_LLAVA,
    others=_LLAVA_OTHERS,
)
GEMMA3 = Multimodal(
    model_type="gemma3",
    name="Gemma3",
    models="Gemma 3 (4B, 12B, 27B)",
    texts={"gemma3_text": "gemma3_text"},
    stored=_LLAVA,
    others=_LLAVA_OTHERS,
    only_text=("final_logit_softcapping",),
)
QWEN2_VL = Multimodal(
    model_type="qwen2_vl",
    name="Qwen2VL",
    models="Qwen2-VL",
    texts={"qwen2_vl_text": "qwen2"},
    stored=_QWEN,
    others=_QWEN_OTHERS,
    rope=("mrope_section",),
)
QWEN2_5_VL = Multimodal(
    model_type="qwen2_5_vl",
    name="Qwen2_5_VL",
    models="Qwen2.5-VL",
    texts={"qwen2_5_vl_text": "qwen2"},
    stored=_QWEN,
    others=_QWEN_OTHERS,
    rope=("mrope_section",),
)
QWEN3_VL = Multimodal(
    model_type="qwen3_vl",
    name="Qwen3VL",
    models="Qwen3-VL, dense",
    texts={"qwen3_vl_text": "qwen3"},
    stored=_QWEN,
    others=_QWEN_OTHERS,
    rope=("mrope_section", "mrope_interleaved"),
)
