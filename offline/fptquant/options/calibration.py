"""What a recipe says of the calibration text."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class CalibrationOptions(BaseModel):
    """The text that ranges and rounding are fitted to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "builtin",
        description="'builtin', a text file, or a dataset (file, directory or hub name); "
        "'text:' in front takes JSON and the like as text",
    )
    config: str | None = Field(None, description="configuration name of a dataset")
    split: str = "train"
    field: str = Field("text", description="column of a dataset: text, chats (through the chat template) or token ids")
    sequences: PositiveInt = 64
    length: int = Field(512, ge=8)
    chats: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the sequences that are chats about the text, whose answers the model writes itself",
    )
    special_tokens: bool = Field(True, description="start each sequence with the tokens the tokenizer puts first (BOS)")
