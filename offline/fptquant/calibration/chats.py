"""Chats to calibrate on: requests about passages of the calibration text, which the model itself answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fptquant.calibration.text import encode, rendered, without_leading

REQUESTS = (
    "What is this text about?\n\n{passage}",
    "Explain this to a child:\n\n{passage}",
    "{passage}\n\nGo on with this text.",
    "Write a question about this text, and answer it.\n\n{passage}",
    "Which names and places are in this text? Give me a list.\n\n{passage}",
    "Give this text a title:\n\n{passage}",
    "{passage}\n\nIs that good or bad? Say why.",
)
PASSAGE = 48  # tokens that a request is about
ANSWER = 128  # tokens of an answer at most; a longer one is cut off, as by a server's limit
BATCH = 16  # sequences that are written together, at most


def chat_sequences(sequences: int, share: float) -> list[int]:
    """Indices of the calibration sequences that are chats, spread evenly.

    They come in pairs, because halves of the text (`rounding.propagation`) are every other sequence; the first pair is
    text, whose words stand for what a prompt may begin with (`SinkRecorder`).

    Args:
        sequences: how many there are.
        share: of them that are chats, from 0 to below 1.
    """

    def before(pair: int) -> int:
        return int(pair * share + 1e-9)

    return [index for index in range(sequences) if before(index // 2 + 1) > before(index // 2)]


def require_chats(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tries the chat template.

    Raises:
        FPTQuantError: it fails.
    """
    _prompt(tokenizer, [], 0, 0)


@torch.no_grad()
def write_chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    prefix: Sequence[int],
    ends: Sequence[int],
    first: int = 0,
) -> Tensor:
    """Sequences of chats in the place of sequences of text: requests about its passages, and greedy answers.

    As a server does, a prompt is what the chat template makes of a user's message and what opens the answer; what
    follows is generated, each chat by itself. In a sequence they stand one behind another, the last one cut off.

    Args:
        model: the original in float32, all of it in memory.
        tokenizer: of the model, with a chat template that `require_chats` has tried.
        windows: (sequences, length) text, on the model's device; `BATCH` at most.
        prefix: what each of them begins with (`sequence_prefix`), and so do the chats' sequences.
        ends: tokens that end an answer.
        first: index of the first sequence, by which requests take turns.

    Returns:
        (sequences, length) tokens.
    """
    length, texts = windows.shape[1], windows[:, len(prefix) :].tolist()
    found = [list(prefix) for _ in texts]
    for turn in range(length):
        growing = [row for row, tokens in enumerate(found) if len(tokens) < length]
        prompts = {row: _prompt(tokenizer, texts[row], first + row + turn, turn) for row in growing}
        for row, prompt in prompts.items():
            found[row] += without_leading(tokenizer, prompt, prefix if turn == 0 else ())
        asked = [row for row in growing if len(found[row]) < length]
        if not asked:
            break
        limit = min(ANSWER, length - min(len(found[row]) for row in asked))
        for row, answer in zip(asked, answers(model, [prompts[row] for row in asked], ends, limit), strict=True):
            found[row] += answer
    return torch.tensor([tokens[:length] for tokens in found], dtype=torch.int64, device=windows.device)


def _prompt(tokenizer: PreTrainedTokenizerBase, text: list[int], request: int, turn: int) -> list[int]:
    """Tokens of a request about the passage that is `turn`'s in a text, up to where the answer begins."""
    start = turn * PASSAGE % max(len(text) - PASSAGE + 1, 1)
    passage = tokenizer.decode(text[start : start + PASSAGE], skip_special_tokens=True).strip()
    message = {"role": "user", "content": REQUESTS[request % len(REQUESTS)].format(passage=passage)}
    remedy = "so that the model can't be asked: leave calibration.chats out"
    return encode(tokenizer, rendered(tokenizer, [message], "chats", "a user's message", remedy, answered=True))


def answers(model: PreTrainedModel, prompts: Sequence[list[int]], ends: Sequence[int], limit: int) -> list[list[int]]:
    """What follows each prompt, up to one of `ends`, which is the last token then, or `limit` tokens."""
    width = max(map(len, prompts))
    padding = ends[0] if ends else 0
    rows = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]  # padded on the left
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=list(ends) or None, pad_token_id=padding
    )
    device = model.device
    tokens = model.generate(
        torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=options,
    )
    found = []
    for answer in tokens[:, width:].tolist():
        stop = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
        found.append(answer[:stop])
    return found
