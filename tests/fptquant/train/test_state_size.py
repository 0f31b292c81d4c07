"""How much disk a run is expected to take, against what it takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.files import folder_size
from fptquant.run import publication
from fptquant.run.state_size import state_bytes
from tests.fptquant.train.test_training import make_job

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
TRAINING = {"sequences": 8, "length": 64, "save_every": 1}
STAGES: dict[str, dict[str, Any]] = {
    "layers": {},
    "all": {"local": {"steps": 2}, "end_to_end": {"steps": 2}, "scales": {"steps": 2}},
    "block-wise": {"block_wise": {"steps": 2}},
    "groups": {"precision": "w4a8kv8-g32", "block_wise": {"steps": 2}, "end_to_end": {"steps": 2}},
}


@pytest.mark.parametrize("case", STAGES)
def test_state_and_checkpoint_take_what_was_expected(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("gqa", tmp_path, SIZES, training=TRAINING, **STAGES[case])

    def broken(*_: object) -> None:
        raise FPTQuantError("stop")

    check, disk = pipeline.require_read_back, SimpleNamespace(free=job.output_bytes + state_bytes(job) - 1)
    monkeypatch.setattr(pipeline, "require_read_back", broken)  # the last that happens while all of the state is there
    monkeypatch.setattr(publication.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(FPTQuantError, match="MB free, but the checkpoint and the run's state need about"):
        pipeline.quantize(job, tmp_path / "out")
    disk.free += 1
    with pytest.raises(FPTQuantError, match="stop"):
        pipeline.quantize(job, tmp_path / "out")
    state = folder_size(tmp_path / ".out.state")
    assert 0.7 < state / state_bytes(job) < 1.2

    disk.free = job.output_bytes + max(0, state_bytes(job) - state)  # what is there already needs no space again
    monkeypatch.setattr(pipeline, "require_read_back", check)
    pipeline.quantize(job, tmp_path / "out")
