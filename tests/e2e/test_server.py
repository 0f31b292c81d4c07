"""`fptquant serve`, which is `vllm serve`, as a subprocess, asked through the `openai` client and `fptquant chat`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
import psutil
import pytest

from fptquant.loading import Source
from tests import forkserver
from tests.vllm_fptquant.serve_stock import write_chat
from tests.vllm_fptquant.serve_tokens import ENVIRONMENT
from vllm_server import Server, serve

pytestmark = pytest.mark.vllm

MODEL = "smollm2-int4"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Berlin", "Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "show_city", "description": "Shows a city on a map", "parameters": CITY, "strict": True},
}
TOOL_OPTIONS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
OPTIONS = ("--enforce-eager", "--max-model-len", "512", "--served-model-name", MODEL, *TOOL_OPTIONS)


def processes(server: Server) -> list[int]:
    """Those of a server that run: it leads a group of its own."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == server.proc.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def stop(server: Server, by: signal.Signals) -> None:
    """Ends a server by a signal, as Ctrl-C and `docker stop` do: it says so with its exit code, and leaves nothing."""
    assert len(processes(server)) > 1, "the engine has a process of its own"
    server.proc.send_signal(by)
    code = server.proc.wait(60)
    deadline = time.monotonic() + 10
    while processes(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert code == 0 and not processes(server), f"{by.name}, {code}: {server.log.read_text()[-3000:]}"


@pytest.fixture(scope="module")
def server(default_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    program = [sys.executable, "-m", "fptquant"]
    with serve(default_checkpoint, *OPTIONS, log=log, program=program) as running:
        yield running
        # before it is stopped: vLLM's processes don't always stop in the order that they expect
        assert "Traceback" not in running.log.read_text()
        stop(running, signal.SIGINT)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="none", timeout=120, max_retries=0)


def test_completion_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=8, temperature=0, logprobs=2)
    choice = answer.choices[0]
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs)
    assert "".join(choice.logprobs.tokens or []) == choice.text


def test_chat_answer_is_right(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=40, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_chat(server: Server) -> None:
    command = [sys.executable, "-m", "fptquant", "chat", "--server", server.base_url, "--new-tokens", "40"]
    asked = f"{QUESTION[0]['content']}\nAnd of Italy?\n"
    result = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    assert "Paris" in result.stdout and result.stdout.count("> ") == 3


def test_streaming_equals_not_streaming(client: openai.OpenAI) -> None:
    settings = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**settings, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_16_concurrent_requests(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        prompt = f"Count: {number}, {number + 1}, {number + 2},"
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    right = [str(number + 3) in answer for number, answer in enumerate(together)]
    assert sum(right) >= 14, together


def test_wrong_model_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nonsense"):
        client.completions.create(model="nonsense", prompt="x")


def test_prompt_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model=MODEL, prompt="word " * 600, max_tokens=4)


@pytest.fixture(scope="module")
def original(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server of stock vLLM beside ours: of the model before it was quantized."""
    log = tmp_path_factory.mktemp("original") / "vllm.log"
    with serve(source.path, "--dtype", "float32", *OPTIONS, log=log, env={"VLLM_PLUGINS": ""}) as running:
        yield openai.OpenAI(base_url=running.base_url, api_key="none", timeout=120, max_retries=0)
        stop(running, signal.SIGTERM)


def test_json_schema(client: openai.OpenAI, original: openai.OpenAI) -> None:
    """What is asked for in prose comes back as JSON, as from the original."""
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for asked in (client, original):
        answer = asked.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=40, temperature=0, response_format=form
        )
        assert json.loads(answer.choices[0].message.content or "") == {"city": "Paris"}, asked.base_url


def test_named_tool(client: openai.OpenAI, original: openai.OpenAI) -> None:
    """The model calls the tool that was named, as it does before it is quantized."""
    choice = {"type": "function", "function": {"name": "show_city"}}
    for asked in (client, original):
        answer = asked.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=100, temperature=0, tools=[TOOL], tool_choice=choice
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.function.name == "show_city", asked.base_url
        assert json.loads(call.function.arguments) == {"city": "Paris"}, asked.base_url


def test_json_schema_of_the_export(default_checkpoint: Path, tmp_path: Path) -> None:
    """The same by stock vLLM, without the plugin.

    It answers only with VNNI: without it vLLM's products with 8-bit weights saturate (docs/export.md).
    """
    options = ("-o", tmp_path / "export", "--quality", 0)
    exported = forkserver.run(forkserver.fptquant, "export", default_checkpoint, *options)
    assert "what could not be kept:" in exported.stdout and "first token" in exported.stdout
    cpu = Path("/proc/cpuinfo").read_text()
    if "avx512_vnni" not in cpu:
        return
    dtype = "bfloat16" if "amx_int8" in cpu else "float32"  # AMX's kernel multiplies in 16 bits only
    request = (tmp_path / "answer", tmp_path / "export", dtype, QUESTION, CITY)
    process = forkserver.run(write_chat, *request, VLLM_PLUGINS="", **ENVIRONMENT)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    assert json.loads((tmp_path / "answer").read_text()) == {"city": "Paris"}
