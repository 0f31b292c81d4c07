"""Carries out docker/Dockerfile.cpu without a Docker engine, and uses the result: `make image-check`, as root.

The instructions are read from the file and run in a root file system of its own, which debootstrap makes from Debian's
packages: Debian 12 with its Python 3.11 stands in for `python:3.11-slim-bookworm`. In what comes out a tiny model is
quantized and served as the image would, without network, by the image's user, and a damaged checkpoint is tried.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

from dockerfile import Image, image, read

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile.cpu"
BASE = "FROM python:3.11-slim-bookworm"
PACKAGES = "python3,python3-dev,python3-pip,python3-venv,ca-certificates"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OTHER_USER = "12345"  # as `docker run --user` may say
KEY = "secret"
START_SECONDS = 300  # the health check's start period

MAKE_MODEL = """
import sys, torch
from tests.conftest import build_model, build_tokenizer
model = build_model("gqa", head_dim=32)
model.config.dtype = torch.float32
model.save_pretrained(sys.argv[1])
build_tokenizer(bos=True).save_pretrained(sys.argv[1])
"""


def main() -> None:
    """Makes the root file system and everything in it; the first thing that goes wrong ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="work here, and keep what was built (default: a temporary one)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside == "build":
        build(options.folder)
        return
    if options.inside:
        CONTAINERS[options.inside](options.folder, image(read(DOCKERFILE)))
        return
    if os.geteuid() or not shutil.which("debootstrap"):
        sys.exit("check_image.py: needs root and debootstrap (`apt-get install debootstrap`)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what runs inside, too
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fptquant-image-", dir="/var/tmp") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        if not (folder / "built").exists():
            make_base(folder / "root")
            enter("build", folder, network=True)
            (folder / "built").touch()
        make_model(folder)
        for container in CONTAINERS:
            enter(container, folder, network=False)
    print(f"passed after {time.monotonic() - started:.0f} s")


def step(text: str) -> None:
    """Prints the headline of a step."""
    print(f"==> {text}", flush=True)


def fail(text: str) -> NoReturn:
    """Ends the check."""
    sys.exit(f"check_image.py: failed: {text}")


def make_base(root: Path) -> None:
    """What stands in for the base image."""
    first = read(DOCKERFILE)[0]
    if f"{first.name} {first.value}" != BASE:
        fail(f"{DOCKERFILE.name} is built on {first.value}; what stands in for it here is for '{BASE}'")
    step(f"Debian 12 and its Python 3.11, in place of {first.value}")
    shutil.rmtree(root, ignore_errors=True)
    log = root.with_suffix(".log")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), MIRROR]
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
            fail("debootstrap:\n" + log.read_text()[-2000:])
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):  # the image's Python is no distribution's
        marker.unlink()
    (root / "usr" / "local" / "bin" / "python3").symlink_to("/usr/bin/python3")  # where the image's is
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")


def make_model(folder: Path) -> None:
    """A tiny random model to quantize, and a place for the result that `OTHER_USER` may write to."""
    for name in ("source", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "out").mkdir()
    os.chown(folder / "out", int(OTHER_USER), int(OTHER_USER))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'offline'}:{ROOT}"}
    subprocess.run([sys.executable, "-c", MAKE_MODEL, folder / "source"], cwd=ROOT, env=environment, check=True)
    for file in (folder / "source").iterdir():
        file.chmod(0o644)  # `save_pretrained` lets only the owner read weights


def enter(phase: str, folder: Path, *, network: bool) -> None:
    """Runs a phase with mounts and processes of its own, which are gone behind it; without network, too, if asked."""
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
    done = subprocess.run([*apart, sys.executable, __file__, "--inside", phase, "--folder", str(folder)])
    if done.returncode:
        sys.exit(done.returncode)


def mount_system(root: Path) -> None:
    """What a container has: processes, devices."""
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    subprocess.run(["mount", "--rbind", "/dev", root / "dev"], check=True)
    subprocess.run(["mount", "--rbind", "/sys", root / "sys"], check=True)


def bind(source: Path, target: Path, *, writable: bool = False) -> None:
    """Shows a file or directory of this machine in the root file system, as `docker run --volume` does."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    subprocess.run(["mount", "--bind", source, target], check=True)
    if not writable:
        subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)


def within(root: Path, state: Image, command: list[str], extra: Mapping[str, str], *, user: str = "") -> list[str]:
    """The command line that runs `command` in the root file system, as Docker would after the steps so far.

    Args:
        root: of the file system.
        state: environment, directory and user.
        command: to run.
        extra: more of the environment.
        user: number, in place of the image's.
    """
    number = user or state.user
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    environment = {"PATH": SEARCH_PATH, "HOME": "/root", **threads, **state.env, **extra}
    # no capability and no way to one, as in docker/compose.yaml
    drop = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all"]  # fmt: skip
    assignments = [f"{name}={value}" for name, value in environment.items()]
    become = [] if number == "root" else drop
    return ["chroot", str(root), *become, "env", "-i", f"--chdir={state.workdir}", *assignments, *command]


def build(folder: Path) -> None:
    """Carries out the Dockerfile's instructions behind FROM."""
    root = folder / "root"
    mount_system(root)
    machine = pip_settings()
    for path in sorted({path for value in machine.values() for path in local_paths(value)}):
        bind(Path(path), root / path.removeprefix("/"))
    state = Image()
    for instruction in read(DOCKERFILE)[1:]:
        step(f"{instruction.name} {instruction.value[:100]}")
        state.apply(instruction)
        if instruction.name == "WORKDIR":
            (root / state.workdir.removeprefix("/")).mkdir(parents=True, exist_ok=True)
        elif instruction.name == "COPY":
            copy(instruction.value, root, state.workdir)
        elif instruction.name == "RUN":
            command = within(root, state, ["/bin/sh", "-c", instruction.value], machine)
            if subprocess.run(command).returncode:
                fail(f"{instruction.name} {instruction.value}")


def pip_settings() -> dict[str, str]:
    """This machine's configuration of pip and of certificates, as environment variables."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = {name: os.environ[name] for name in ("SSL_CERT_FILE", "TORCH_INDEX_URL") if name in os.environ}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        found["PIP_" + name.rpartition(".")[2].upper().replace("-", "_")] = str(ast.literal_eval(value))
    return found


def local_paths(setting: str) -> Iterator[str]:
    """The files and directories of this machine that a setting names; of an index also what lies beside it."""
    for word in setting.split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            yield str(path.parent if word.startswith("file://") else path)


def copy(arguments: str, root: Path, workdir: str) -> None:
    """COPY: files into a directory, or what is in a directory."""
    *sources, target = arguments.split()
    place = root / str(Path(workdir, target)).removeprefix("/")
    for source in (ROOT / name for name in sources):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")  # as in .dockerignore
            shutil.copytree(source, place, ignore=ignored, dirs_exist_ok=True)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)


def container(folder: Path) -> Path:
    """A root file system that starts as the image's; what is written to it is gone behind the phase."""
    written, root = folder / "written", folder / "container"
    shutil.rmtree(written, ignore_errors=True)
    for name in (written / "files", written / "work", root):
        name.mkdir(parents=True, exist_ok=True)
    layers = f"lowerdir={folder / 'root'},upperdir={written / 'files'},workdir={written / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, root], check=True)
    root.chmod(0o755)
    mount_system(root)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return root


def quantize(folder: Path, state: Image) -> None:
    """What `docker run --user NUMBER IMAGE quantize` does."""
    step(f"quantize, as user {OTHER_USER}")
    root = container(folder)
    bind(folder / "source", root / "source")
    bind(folder / "out", root / "out", writable=True)
    quick = ("--recipe", "fptquant-light", "--sequences", "4", "--quality", "1")
    arguments = [*state.entrypoint, "quantize", "/source", "-o", "/out/tiny", *quick]
    if subprocess.run(within(root, state, arguments, {"HF_HUB_OFFLINE": "1"}, user=OTHER_USER)).returncode:
        fail("quantize")


def start_server(root: Path, state: Image, checkpoint: Path, log: Path) -> subprocess.Popen[bytes]:
    """The first process of the container that `docker compose --profile cpu up` would start."""
    bind(checkpoint, root / "model")
    extra = {"HF_HUB_OFFLINE": "1", "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = within(root, state, [*state.entrypoint, *state.command], extra)
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def serve(folder: Path, state: Image) -> None:
    """Starts the server, waits for the image's health check, asks for a completion, and stops it as Docker would."""
    step(f"serve, as user {state.user}")
    if state.user in ("", "root", "0"):
        fail("the image's user is root")
    root, log, begin = container(folder), folder / "serve.log", time.monotonic()
    process = start_server(root, state, folder / "out" / "tiny", log)
    check = within(root, state, state.healthcheck, {})
    while subprocess.run(check, capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() - begin > START_SECONDS:
            fail(f"the server is not healthy (status {process.poll()}):\n{tail(log)}")
        time.sleep(1)
    print(f"healthy after {time.monotonic() - begin:.0f} s")
    owner = (root / "proc" / str(process.pid)).stat().st_uid
    if str(owner) != state.user:
        fail(f"the server runs as user {owner}")
    refused, (status, text) = ask(key="")[0], ask(key=KEY)
    print(f"without the key: status {refused}; with it: {status} {text!r}")
    if (refused, status) != (401, 200):
        fail("the key does not decide who is answered")
    process.send_signal(signal.SIGINT)
    print(f"stopped with status {process.wait(60)}")


def ask(key: str) -> tuple[int, str]:
    """HTTP status of a completion, and its text."""
    body = json.dumps({"model": "/model", "prompt": "The sea", "max_tokens": 8, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        return error.code, ""


def refuse(folder: Path, state: Image, *, damaged: str) -> None:
    """A checkpoint that can't be served ends the container with an error.

    Args:
        folder: of the check.
        state: of the image.
        damaged: the file of which half is missing.
    """
    step(f"serve a checkpoint with half of its {damaged}")
    bad, log, begin = folder / "bad", folder / "bad.log", time.monotonic()
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(folder / "out" / "tiny", bad)
    file = bad / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    process = start_server(container(folder), state, bad, log)
    try:
        status = process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        fail(f"the server is still trying:\n{tail(log)}")
    if not status:
        fail(f"no error:\n{tail(log)}")
    print(f"ended after {time.monotonic() - begin:.0f} s with status {status}: {reason(log)}")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-3000:]


def reason(log: Path) -> str:
    """The last line that speaks of an error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search("error", line, re.IGNORECASE)]
    return lines[-1].strip() if lines else tail(log)


CONTAINERS: dict[str, Callable[[Path, Image], None]] = {
    "quantize": quantize,
    "serve": serve,
    "damaged weights": partial(refuse, damaged="model.safetensors"),
    "damaged config": partial(refuse, damaged="config.json"),
}

if __name__ == "__main__":
    main()
