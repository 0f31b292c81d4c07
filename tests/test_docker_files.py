"""The image files, as far as they can be checked without a Docker engine; `make image-check` carries one out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import check_image
import dockerfile
from fptquant import cli

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = {"cpu": DOCKER / "Dockerfile.cpu", "gpu": DOCKER / "Dockerfile.gpu"}
each = pytest.mark.parametrize("path", DOCKERFILES.values(), ids=DOCKERFILES)


def values(path, name):
    return [step.value for step in dockerfile.read(path) if step.name == name]


def services():
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


@each
def test_dockerfile_is_clean(path):
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@each
def test_dockerfile_copies_what_exists_and_the_context_has(path):
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [word for copy in values(path, "COPY") for word in copy.split()[:-1]]
    assert {"pyproject.toml", "scripts/install.sh", "offline", "vllm_fptquant"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, f".dockerignore keeps {source} out"


@pytest.mark.parametrize(("kind", "backend"), [("cpu", "cpu"), ("gpu", "none")])
def test_dockerfile_uses_the_install_script(kind, backend):
    runs = " ".join(values(DOCKERFILES[kind], "RUN"))
    assert f"scripts/install.sh --backend {backend} " in runs
    assert "pip install" not in runs  # installing anything beside the script would go untested


@each
def test_image_is_a_user_s_and_healthy_when_it_answers(path):
    image = dockerfile.image(dockerfile.read(path))
    assert image.user not in ("", "root", "0") and image.env["HOME"] == image.workdir
    program, flag, code = image.healthcheck
    assert (program, flag) == ("python3", "-c") and ":8000/health" in code
    compile(code, "healthcheck", "exec")


@each
def test_image_serves_unless_it_is_told_otherwise(path):
    image = dockerfile.image(dockerfile.read(path))
    commands = typer.main.get_command(cli.app).commands
    assert image.entrypoint == ["fptquant"] and image.command[:2] == ["serve", "/model"]
    assert {"serve", "quantize"} <= commands.keys()


def test_both_images_are_used_alike():
    cpu, gpu = (dockerfile.image(dockerfile.read(path)) for path in DOCKERFILES.values())
    for fact in ("user", "workdir", "entrypoint", "command", "healthcheck"):
        assert getattr(cpu, fact) == getattr(gpu, fact), fact


def test_compose_serves_a_mounted_checkpoint():
    assert services().keys() == DOCKERFILES.keys()
    for kind, service in services().items():
        assert service["profiles"] == [kind]
        assert service["volumes"][0].endswith(":/model:ro")
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKERFILES[kind]
    assert services()["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_compose_is_for_this_machine_and_gives_up():
    for service in services().values():
        (port,) = service["ports"]
        assert port == "${ADDRESS:-127.0.0.1}:${PORT:-8000}:8000"
        assert "VLLM_API_KEY" in service["environment"] and service["environment"]["VLLM_API_KEY"] is None
        policy, _, most = service["restart"].partition(":")
        assert policy == "on-failure" and 0 < int(most) < 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM a\nADD b c", "'ADD' is not known"),
        ("FROM a\nCMD serve", "a shell would run it"),
        ("FROM a\nRUN --mount=type=cache,target=/x true", "options of RUN"),
        ("FROM a\nHEALTHCHECK NONE", "no command"),
        ("FROM a\nFROM b", "not exactly one FROM"),
        ("RUN true", "not exactly one FROM"),
    ],
)
def test_reader_passes_over_nothing(tmp_path, text, message):
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(ValueError, match=message):
        dockerfile.read(tmp_path / "Dockerfile")


def test_reader_reads(tmp_path):
    (tmp_path / "Dockerfile").write_text(
        '# no step\nFROM a\nENV A=1 \\\n    B="2 3"\n# in between\nRUN one \\\n    && two\nENV A=4\nCMD ["x"]\n'
    )
    steps = dockerfile.read(tmp_path / "Dockerfile")
    assert [step.name for step in steps] == ["FROM", "ENV", "RUN", "ENV", "CMD"]
    assert steps[2].value.split() == ["one", "&&", "two"]
    assert dockerfile.image(steps).env == {"A": "4", "B": "2 3"} and dockerfile.image(steps).command == ["x"]


def test_check_stands_in_for_the_base_and_finds_pip_s_places(tmp_path):
    assert f"FROM {values(DOCKERFILES['cpu'], 'FROM')[0]}" == check_image.BASE
    index = tmp_path / "index" / "simple"
    index.mkdir(parents=True)
    found = list(check_image.local_paths(f"file://{index} {tmp_path}\nhttps://a.org/simple /no/such"))
    assert found == [str(index.parent), str(tmp_path)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_check_runs_commands_as_docker_would():
    """As another user, with the image's environment only, in its directory."""
    image = dockerfile.Image(env={"A": "b c"}, workdir="/tmp", user="1001")
    command = check_image.within(Path("/"), image, ["sh", "-c", "id -u; id -G; pwd; env"], {"D": "e"})
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "SEEN": "1"})
    user, groups, place, *environment = done.stdout.splitlines()
    assert (user, groups, place) == ("1001", "1001", "/tmp")
    assert {"A=b c", "D=e"} <= set(environment) and "SEEN=1" not in environment
