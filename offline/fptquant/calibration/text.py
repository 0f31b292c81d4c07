"""Calibration text: the shipped one, a text file, or a dataset of the `datasets` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fptquant.errors import FPTQuantError
from fptquant.recipe import CalibrationOptions

_DATASET_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    vocabulary: int,
    seed: int,
    sink: int | None = None,
    *,
    at_most: bool = False,
) -> Tensor:
    """Token windows drawn at random, without overlap, from the calibration text.

    Args:
        tokenizer: of the model.
        options: source, number and length of sequences.
        vocabulary: size of the model's embedding; tokens beyond it are an error.
        seed: which windows are drawn.
        sink: token that every sequence has to start with, whatever the options say.
        at_most: take fewer sequences where the text is too short for all.

    Returns:
        (sequences, length) int64.

    Raises:
        FPTQuantError: unreadable source, or a text too short.
    """
    prefix = leading_tokens(tokenizer) if options.special_tokens else []
    if sink is not None and prefix[:1] != [sink]:
        prefix = [sink]
    body = options.length - len(prefix)
    needed = options.sequences * body
    tokens: list[int] = []
    for text in _texts(options, seed):
        tokens += encode(tokenizer, text)
        if len(tokens) >= 4 * needed:  # enough to draw from
            break
    if len(tokens) < (body if at_most else needed):
        raise FPTQuantError(
            f"calibration text '{options.source}' has {len(tokens)} tokens, but {options.sequences} sequences of "
            f"{options.length} need {needed}: give a longer text or lower --sequences or --length"
        )
    require_known(max(tokens), vocabulary)
    count = len(tokens) // body
    windows = torch.tensor(tokens[: count * body]).view(count, body)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: options.sequences]
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).repeat(len(drawn), 1), windows[drawn]), 1)


def require_known(token: int, vocabulary: int) -> None:
    """Refuses a token that the model's embedding has no row for.

    Raises:
        FPTQuantError: names both.
    """
    if token >= vocabulary:
        raise FPTQuantError(
            f"the tokenizer produces token {token}, but the model's vocabulary has {vocabulary} entries: "
            "tokenizer and model do not belong together"
        )


def fingerprint(windows: Tensor) -> str:
    """Short hash of the calibration tokens, recorded in the checkpoint."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text of any length, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (usually a BOS, or none) that the tokenizer puts in front of a text by itself."""
    plain, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return full[: full.index(plain[0])]


def sink_token(tokenizer: PreTrainedTokenizerBase, choice: str) -> int | None:
    """The token that recipe field `sink` stands for.

    Args:
        tokenizer: of the model.
        choice: 'auto' takes the token that the tokenizer puts first or, if it puts none, the first of its chat
            template; 'none'; or a token as text.

    Returns:
        Its id, None for none.

    Raises:
        FPTQuantError: not a single token, or a chat template that fails.
    """
    if choice == "none":
        return None
    if choice != "auto":
        tokens = encode(tokenizer, choice)
        if len(tokens) != 1:
            raise FPTQuantError(f"sink: '{choice}' is {len(tokens)} tokens of this tokenizer, but it has to be one")
        return tokens[0]
    first = leading_tokens(tokenizer)
    if not first and tokenizer.chat_template is not None:
        message = [{"role": "user", "content": "a"}]
        try:
            text = str(tokenizer.apply_chat_template(message, tokenize=False))
        except Exception as error:  # a template is a program
            raise FPTQuantError(
                f"sink: the chat template fails on a user's message ({' '.join(str(error).split())}), "
                "so that its first token isn't known: name the token, or 'none'"
            ) from None
        first = encode(tokenizer, text)
    return first[0] if first else None


def _texts(options: CalibrationOptions, seed: int) -> Iterator[str]:
    path = Path(options.source)
    builtin = options.source == "builtin"
    is_text = builtin or (path.is_file() and path.suffix not in _DATASET_BUILDERS)
    if is_text:
        for name in ("config", "split", "field"):
            if getattr(options, name) != CalibrationOptions.model_fields[name].default:
                raise FPTQuantError(
                    f"calibration.{name}: only a dataset has one, and '{options.source}' is a text: leave it out"
                )
    if builtin:
        yield (resources.files("fptquant") / "data" / "wiki.calib.txt").read_text(encoding="utf-8")
    elif is_text:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FPTQuantError(f"calibration file '{path}' is not UTF-8 text: {error.reason}") from None
    else:
        yield from _dataset_texts(options, path, seed)


def _dataset_texts(options: CalibrationOptions, path: Path, seed: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise FPTQuantError(
            f"calibration source '{options.source}' is no text file; to read it as a dataset, "
            "install the datasets library: pip install 'vllm-fptquant[data]'"
        ) from None
    arguments: dict[str, Any] = {"path": options.source, "name": options.config}
    if path.is_file():
        arguments = {"path": _DATASET_BUILDERS[path.suffix], "data_files": str(path)}
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
            data = data[options.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(**arguments, split=options.split)
    except Exception as error:  # the library raises many kinds, all of them the source's fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FPTQuantError(
            f"calibration source '{options.source}' is neither a text file nor a dataset that can be loaded: {reason}"
        ) from None
    if options.field not in data.column_names:
        raise FPTQuantError(
            f"calibration dataset '{options.source}' has no column '{options.field}'; "
            f"it has: {', '.join(data.column_names)} (choose with --calibration-field)"
        )
    for row in data.shuffle(seed=seed):
        if row[options.field] is not None:
            yield str(row[options.field]) + "\n"
