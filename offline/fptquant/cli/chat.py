"""`fptquant chat`: a quick look at what a checkpoint answers."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import require_checkpoint
from fptquant.console import err, info, out
from fptquant.errors import FPTQuantError
from fptquant.files import first_line

Messages = list[dict[str, str]]


@command()
def chat(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            show_default="the server's", help="directory that `fptquant quantize` wrote; runs in transformers"
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(show_default="none", help="address of a running `fptquant serve`, e.g. http://localhost:8000"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(show_default="asks, line by line", help="say this, print the answer, and end")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="of an answer, at most")] = 256,
) -> None:
    """Talk to CHECKPOINT: the simulation in transformers, or what --server serves. Takes the most likely tokens.

    The simulation is exact and slow; an empty line or Ctrl-D ends it.
    """
    if (checkpoint is None) == (server is None):
        raise FPTQuantError("chat: give either a checkpoint or --server")
    if server is not None:
        answer = _server(server, new_tokens)
    else:
        assert checkpoint is not None
        require_checkpoint(checkpoint)
        answer = _transformers(checkpoint, new_tokens)
    if prompt is not None:
        answer([{"role": "user", "content": prompt}])
        return
    messages: Messages = []
    while True:
        info.print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(messages)})


def _transformers(checkpoint: Path, new_tokens: int) -> Callable[[Messages], str]:
    """Answers with the simulation; without a chat template it goes on with what was said."""
    import torch
    from transformers import TextStreamer

    from fptquant.loading import load_model, open_source

    quiet_transformers()
    with err.status("loading"):
        source = open_source(checkpoint)
        model: Any = load_model(source)
    tokenizer = source.tokenizer

    def answer(messages: Messages) -> str:
        if tokenizer.chat_template is None:
            tokens = tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        else:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        source.require_length("chat", len(tokens) + new_tokens)
        prompt = torch.tensor([tokens])
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        return str(tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True))

    return answer


def _server(address: str, new_tokens: int) -> Callable[[Messages], str]:
    """Answers with an OpenAI-compatible server."""
    base = address.rstrip("/").removesuffix("/v1") + "/v1"

    def ask(path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as reply:
                found: dict[str, Any] = json.load(reply)
                return found
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise FPTQuantError(f"--server: {base}{path} says {error.code}: {reason[:300]}") from None
        except (OSError, ValueError) as error:
            raise FPTQuantError(
                f"--server: nothing answers at {base} ({first_line(error)}): start `fptquant serve OUT`, or give "
                "another address"
            ) from None

    model = ask("/models")["data"][0]["id"]

    def answer(messages: Messages) -> str:
        settings = {"model": model, "messages": messages, "max_tokens": new_tokens, "temperature": 0}
        text = str(ask("/chat/completions", settings)["choices"][0]["message"]["content"])
        out.print(text, markup=False, highlight=False, soft_wrap=True)
        return text

    return answer
