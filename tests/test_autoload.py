"""A wheel, built and installed as users do: transformers loads our checkpoints without an `import fptquant`."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fptquant import hf_entries, pipeline
from fptquant.format import MODEL_TYPE_PREFIX, QUANT_METHOD
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.wiring import FAMILIES
from tests.conftest import EXCERPT

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [[5, 17, 40, 300, 7, 8]]


class Environment:
    """A virtual environment with nothing of ours in it, and below it the packages that these tests run with."""

    def __init__(self, path: Path) -> None:
        venv.create(path, symlinks=True)
        self.python = path / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(path), "platbase": str(path)}))

    def pip(self, *args: str | Path) -> None:
        """With the build backend on the path, and nothing else of ours: pip would take it for the environment's own."""
        backend = self.site.parent / "backend"
        backend.mkdir(exist_ok=True)
        for name in ("hatchling", "editables", "packaging", "pathspec", "pluggy", "trove_classifiers"):
            package = Path(importlib.import_module(name).__file__ or "").parent
            if not (backend / name).exists():
                (backend / name).symlink_to(package)
        command = [sys.executable, "-m", "pip", "--python", self.python, *args]
        offline = ["--disable-pip-version-check", "--no-input"]
        subprocess.run([*command, *offline], check=True, env={**os.environ, "PYTHONPATH": str(backend)})

    def install(self, *args: str | Path) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *args)

    def borrow_packages(self) -> None:
        """Python doesn't read the .pth files in a folder that a .pth file names: our own install stays out."""
        (self.site / "borrowed.pth").write_text(
            "\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")})
        )

    def run(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.python, "-c", code],
            env={**kept, **env},
            cwd=self.site.anchor,
            capture_output=True,
            text=True,
        )

    def answer(self, code: str, **env: str) -> object:
        done = self.run(f"import json\n{code}", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the source distribution, so that this one is known to have all that the wheel needs."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build"]
    subprocess.run([*build, "--target", "sdist", "--directory", folder], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([*build, "--target", "wheel", "--directory", folder], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(wheel)
    environment.borrow_packages()
    return environment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    calibration = {"source": str(EXCERPT), "sequences": 4, "length": 32}
    model = save_model(folder / "model", "gqa")
    job = open_job(model, Recipe.parse({"calibration": calibration, "precision": "w4a4kv4"}))
    pipeline.quantize(job, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def logits(checkpoint: Path) -> list[float]:
    return AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor(TOKENS)).logits[0, -1].tolist()


# By what of transformers a program imports first: the second is in the middle of importing Llama when it imports the
# tables.
WAYS = {
    "pipeline": "from transformers import pipeline; model = pipeline('text-generation', PATH).model",
    # Llama's own class is refused, which takes the quantizer: without it, the answers would be garbage.
    "class": """
from transformers import LlamaForCausalLM
try:
    LlamaForCausalLM.from_pretrained(PATH)
except ValueError as error:
    assert "model_type is 'llama'" in str(error)
else:
    raise AssertionError("loaded")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(PATH)""",
    # A hook in front that looks for every module once more, as others have, and threads that all come first.
    "threads": """
import importlib.util, inspect, sys
from concurrent.futures import ThreadPoolExecutor
class Curious:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if not self.busy and name.startswith("transformers."):
            self.busy = True
            try:
                importlib.util.find_spec(name)
            finally:
                self.busy = False
sys.meta_path.insert(0, Curious())
def load(_):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(PATH)
from transformers.models.auto import configuration_auto
assert {type(configuration_auto.__spec__.loader).__name__, type(configuration_auto.__loader__).__name__} == {
    "SourceFileLoader"
}
assert "class AutoConfig" in inspect.getsource(configuration_auto)
importlib.reload(configuration_auto)
with ThreadPoolExecutor(4) as pool:
    model = list(pool.map(load, range(4)))[-1]""",
}


@pytest.mark.parametrize("way", WAYS)
def test_transformers_loads_a_checkpoint_without_an_import(
    way: str, installed: Environment, checkpoint: Path, logits: list[float]
) -> None:
    code = f"""
PATH = {str(checkpoint)!r}
{WAYS[way]}
import torch
print(json.dumps(model(torch.tensor({TOKENS})).logits[0, -1].tolist()))"""
    assert installed.answer(code, OMP_NUM_THREADS="1") == logits


def test_python_starts_as_fast_as_before(installed: Environment) -> None:
    code = "import sys; print(json.dumps([[type(f).__module__ for f in sys.meta_path], list(sys.modules)]))"
    finders, modules = installed.answer(f"import sys; modules = list(sys.modules); {code}")
    assert finders[0] == "fptquant_autoload"
    bare = subprocess.run(
        [installed.python, "-S", "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "transformers", "fptquant", "typing", "logging", "importlib.util"} & set(modules) - set(bare)
    finders, _ = installed.answer(code, FPTQUANT_AUTOLOAD="0")
    assert "fptquant_autoload" not in finders


def test_a_broken_package_is_one_line_and_transformers_works(
    installed: Environment, checkpoint: Path, tmp_path: Path
) -> None:
    """And one that can't read a checkpoint says so, instead of an answer from weights that were never read."""
    code = "from transformers import {0}; {0}.from_pretrained({1!r})"
    (tmp_path / "fptquant.py").write_text("raise RuntimeError('two\\nlines')")
    done = installed.run(code.format("AutoConfig", str(checkpoint.parent / "model")), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "fptquant" in line] == [
        "fptquant can't register itself with transformers, which won't load its checkpoints (RuntimeError: two lines): "
        "install vllm-fptquant again, or set FPTQUANT_AUTOLOAD=0 to do without it"
    ]
    (tmp_path / "fptquant.py").unlink()
    (tmp_path / "pydantic.py").write_text("raise ImportError('no pydantic')")
    done = installed.run(code.format("AutoModelForCausalLM", str(checkpoint)), PYTHONPATH=str(tmp_path))
    assert done.stderr.splitlines()[-1] == (
        "ImportError: the checkpoint needs fptquant, which can't be imported (no pydantic): install vllm-fptquant again"
    )


def test_uninstalling_leaves_nothing_and_editable_installs_have_it_too(tmp_path: Path, wheel: Path) -> None:
    environment = Environment(tmp_path / "venv")
    for source in (["--editable", ROOT], [wheel]):
        environment.install(*source)
        assert (environment.site / "fptquant_autoload.pth").is_file()
        assert environment.answer("import sys; print(json.dumps('fptquant_autoload' in sys.modules))")
        environment.pip("uninstall", "--quiet", "--yes", "vllm-fptquant")
        assert not [path for path in environment.site.rglob("*") if "fptquant" in path.name]


def test_the_entries_are_the_formats() -> None:
    assert hf_entries.QUANT_METHOD == QUANT_METHOD
    assert set(hf_entries.MODEL_TYPES) == {MODEL_TYPE_PREFIX + family for family in FAMILIES}
