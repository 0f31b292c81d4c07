"""Calibration windows: text, chats and token ids made into token sequences of one length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fptquant.calibration.sources import Chat, Row, rows
from fptquant.errors import FPTQuantError
from fptquant.options.calibration import CalibrationOptions


@dataclass(frozen=True)
class _Draw:
    """Which windows of a stream of tokens were drawn."""

    tokens: list[int]
    prefix: list[int]  # in front of each
    body: int  # tokens of each behind the prefix
    starts: list[int]


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
    found = _draw(tokenizer, options, vocabulary, seed, sink, at_most=at_most)
    return _cut(found.tokens, found.starts, found.prefix, found.body)


def windows_left_over(
    tokenizer: PreTrainedTokenizerBase,
    drawn: Iterable[CalibrationOptions],
    vocabulary: int,
    seed: int,
    sink: int | None,
    windows: int,
) -> Tensor:
    """Windows of the calibration text that `calibration_windows` has not drawn, spread evenly over what it read.

    Args:
        tokenizer: of the model.
        drawn: options of every draw (fewer sequences than asked for are no error); the first one's length is these'.
        vocabulary: see `calibration_windows`; seed and sink, too.
        seed: of the draws.
        sink: token that every sequence starts with.
        windows: how many, at most.

    Returns:
        (up to windows, length) int64.

    Raises:
        FPTQuantError: unreadable source.
    """
    draws = [_draw(tokenizer, options, vocabulary, seed, sink, at_most=True) for options in drawn]
    first, longest = draws[0], max((draw.tokens for draw in draws), key=len)  # a text is read from its start by each
    taken = bytearray(len(longest))
    for draw in draws:
        for start in draw.starts:
            taken[start : start + draw.body] = b"\1" * draw.body
    free, at = [], 0
    while at + first.body <= len(longest):
        last = taken.rfind(1, at, at + first.body)
        if last < 0:
            free.append(at)
        at = at + first.body if last < 0 else last + 1
    spread = sorted({round(index * (len(free) - 1) / max(windows - 1, 1)) for index in range(windows)}) if free else []
    return _cut(longest, [free[index] for index in spread], first.prefix, first.body)


def _cut(tokens: list[int], starts: list[int], prefix: list[int], body: int) -> Tensor:
    windows = [prefix + tokens[start : start + body] for start in starts]
    return torch.tensor(windows, dtype=torch.int64, device="cpu").view(len(starts), len(prefix) + body)


def _draw(
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    vocabulary: int,
    seed: int,
    sink: int | None,
    *,
    at_most: bool,
) -> _Draw:
    """Reads a source up to what is needed and draws where its windows start; arguments as `calibration_windows`."""
    prefix = sequence_prefix(tokenizer, options, sink)
    body = options.length - len(prefix)
    needed = options.sequences * body
    tokens: list[int] = []
    plain = True
    for row in rows(options, seed):
        tokens += _row_tokens(tokenizer, row, options, vocabulary)
        plain &= isinstance(row, str)
        if len(tokens) >= 4 * needed:  # enough to draw from
            break
    starts = _starts(tokens, body, [] if plain else prefix)
    if len(starts) < (1 if at_most else options.sequences):
        needed = max(needed, len(tokens) + 1)  # chats and token ids may bring the prefix along
        raise FPTQuantError(
            f"calibration text '{options.source}' has {len(tokens)} tokens, but {options.sequences} sequences of "
            f"{options.length} need {needed}: give a longer text or lower --sequences or --length"
        )
    require_known(max(tokens), vocabulary)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(len(starts), generator=generator, device="cpu")[: options.sequences].tolist()
    return _Draw(tokens, prefix, body, [starts[i] for i in drawn])


def _row_tokens(
    tokenizer: PreTrainedTokenizerBase, row: Row, options: CalibrationOptions, vocabulary: int
) -> list[int]:
    """Tokens of a text or a chat without those that the tokenizer puts first; token ids as they are."""
    where = f"column '{options.field}' of '{options.source}'"
    if isinstance(row, str):
        return encode(tokenizer, row)
    if isinstance(row, Chat):
        if tokenizer.chat_template is None:
            raise FPTQuantError(
                f"{where} holds chats, but the tokenizer has no chat template: add the model's chat_template.jinja "
                "to its directory, or choose a column of text"
            )
        remedy = "leave such chats out, or choose another column"
        text = rendered(tokenizer, row.messages, where, "a chat of it", remedy)
        return without_leading(tokenizer, encode(tokenizer, text))
    for token in (min(row), max(row)):
        if not 0 <= token < vocabulary:
            raise FPTQuantError(
                f"{where} holds {token}, but the model's tokens are 0 to {vocabulary - 1}: "
                "choose the column of this model's token ids"
            )
    return row


def _starts(tokens: list[int], body: int, prefix: list[int]) -> list[int]:
    """Where windows of `body` tokens begin, without overlap; a `prefix` that stands there already is left out."""
    starts: list[int] = []
    at = 0
    while True:
        if tokens[at : at + len(prefix)] == prefix:
            at += len(prefix)
        if at + body > len(tokens):
            return starts
        starts.append(at)
        at += body


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
    return hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text of any length, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (usually a BOS, or none) that the tokenizer puts in front of a text by itself."""
    plain, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return full[: full.index(plain[0])]


def without_leading(tokenizer: PreTrainedTokenizerBase, tokens: list[int], prefix: Sequence[int] = ()) -> list[int]:
    """A chat's tokens without those that the tokenizer puts first, and without a `prefix` that is there already."""
    for first in (leading_tokens(tokenizer), list(prefix)):
        tokens = tokens[len(first) :] if tokens[: len(first)] == first else tokens
    return tokens


def sequence_prefix(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions, sink: int | None) -> list[int]:
    """What every calibration sequence starts with: what the tokenizer puts first, or the constant token `sink`."""
    prefix = leading_tokens(tokenizer) if options.special_tokens else []
    return [sink] if sink is not None and prefix[:1] != [sink] else prefix


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
        remedy = "so that its first token isn't known: name the token, or 'none'"
        text = rendered(tokenizer, [{"role": "user", "content": "a"}], "sink", "a user's message", remedy)
        first = encode(tokenizer, text)
    return first[0] if first else None


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str,
    what: str,
    remedy: str,
    *,
    answered: bool = False,
) -> str:
    """What the chat template makes of messages; `answered` adds what opens the model's answer.

    Raises:
        FPTQuantError: the template fails; `where`, `what` and `remedy` are parts of the line.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answered))
    except Exception as error:  # a template is a program
        reason = " ".join(str(error).split())
        raise FPTQuantError(f"{where}: the chat template fails on {what} ({reason}), {remedy}") from None
