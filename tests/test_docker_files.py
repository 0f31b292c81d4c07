"""The image files, as far as they can be checked without a Docker engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = {"cpu": DOCKER / "Dockerfile.cpu", "gpu": DOCKER / "Dockerfile.gpu"}


def instructions(path, name):
    text = path.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)
def test_dockerfile_is_clean(path):
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)
def test_dockerfile_copies_what_exists_and_the_context_has(path):
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [word for copy in instructions(path, "COPY") for word in copy.split()[:-1]]
    assert {"pyproject.toml", "scripts/install.sh", "offline", "vllm_fptquant"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, f".dockerignore keeps {source} out"


@pytest.mark.parametrize(("kind", "backend"), [("cpu", "cpu"), ("gpu", "none")])
def test_dockerfile_uses_the_install_script(kind, backend):
    runs = " ".join(instructions(DOCKERFILES[kind], "RUN"))
    assert f"scripts/install.sh --backend {backend} " in runs
    assert "pip install" not in runs  # installing anything beside the script would go untested


def test_compose_serves_a_mounted_checkpoint():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services.keys() == DOCKERFILES.keys()
    for kind, service in services.items():
        assert service["profiles"] == [kind]
        assert [port.rsplit(":", 1)[1] for port in service["ports"]] == ["8000"]
        assert service["volumes"][0].endswith(":/model:ro")
        assert "/health" in service["healthcheck"]["test"][-1]
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKERFILES[kind]
    assert services["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_compose_health_check_is_python_that_parses():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    kind, program, flag, code = services["cpu"]["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "python3", "-c")
    compile(code, "healthcheck", "exec")
