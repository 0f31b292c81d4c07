"""scripts/vllm_server.py against a stand-in for the `vllm` command: starting, failing, stopping."""

import os
import sys
import time
import urllib.request

import pytest

import vllm_server
from vllm_server import ServerError, serve

FAKE_VLLM = f"""#!{sys.executable}
import http.server, os, signal, subprocess, sys

mode = os.environ["FAKE_MODE"]
print("arguments", *sys.argv[1:], flush=True)
if mode == "dies":
    sys.exit("out of memory, sorry")
if mode == "hangs":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
print("worker", worker.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never" else 200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
try:
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
except KeyboardInterrupt:
    sys.exit(0)
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(FAKE_VLLM)
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command.parent / "python"))
    monkeypatch.setattr(vllm_server, "STOP_SECONDS", 1.0)
    return tmp_path / "logs" / "server.log"


def alive(pid):
    """Whether a process runs; one that ended but was not yet collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def worker_of(log):
    return int(log.read_text().split("worker ")[1].split()[0])


def gone(pid):
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_serves_and_stops_with_its_workers(fake_vllm):
    with serve("some/model", "--dtype", "float32", log=fake_vllm, env={"FAKE_MODE": "works"}) as server:
        with urllib.request.urlopen(server.base_url) as reply:
            assert reply.status == 200
        assert "arguments serve some/model" in fake_vllm.read_text()
        assert "--dtype float32" in fake_vllm.read_text()
        worker = worker_of(fake_vllm)
        assert alive(worker)
    assert server.proc.returncode == 0
    assert gone(worker)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_stops_when_the_caller_fails(fake_vllm, error):
    with pytest.raises(error), serve("m", log=fake_vllm, env={"FAKE_MODE": "works"}) as server:
        raise error
    assert server.proc.returncode == 0
    assert gone(worker_of(fake_vllm))


def test_kills_a_server_that_ignores_the_request(fake_vllm):
    with serve("m", log=fake_vllm, env={"FAKE_MODE": "hangs"}) as server:
        pass
    assert server.proc.returncode == -9
    assert gone(worker_of(fake_vllm))


def test_a_server_that_dies_shows_its_log(fake_vllm):
    with pytest.raises(ServerError, match="(?s)ended with code 1.*out of memory, sorry"):  # noqa: SIM117
        with serve("m", log=fake_vllm, env={"FAKE_MODE": "dies"}):
            pytest.fail("it never became ready")


def test_gives_up_after_the_timeout(fake_vllm):
    waited = []
    with pytest.raises(ServerError, match="not ready after 2 s"):  # noqa: SIM117
        with serve("m", log=fake_vllm, env={"FAKE_MODE": "never"}, timeout=2, progress=waited.append):
            pytest.fail("it never became ready")
    assert waited
    assert gone(worker_of(fake_vllm))


def test_names_the_extra_when_vllm_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match=r"install the extra \[cpu\]"):  # noqa: SIM117
        with serve("m", log=tmp_path / "log"):
            pytest.fail("there is nothing to start")
    assert not os.listdir(tmp_path)
