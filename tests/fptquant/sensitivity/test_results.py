"""Measurements that survive, and their plots."""

import json
from pathlib import Path

import pytest

from fptquant.errors import FPTQuantError
from fptquant.options.sensitivity import check_plot
from fptquant.sensitivity import Effect, Probe, Site, sites_of
from fptquant.sensitivity.results import Results, Row, measure_all, missing, plot

SETTINGS = {"model": "m", "recipe": "abc"}


def test_results_come_back_and_are_not_measured_again(probe: Probe, tmp_path: Path) -> None:
    file, sites = tmp_path / "s.json", sites_of(probe.job, ["keys", "down_input"])
    first = Results(SETTINGS, file)
    steps = measure_all(probe, missing(sites, first, per_layer=True), first)
    assert next(steps) == ("keys", 0)  # and here the process is killed
    stored = json.loads(file.read_text())
    assert stored["rows"][0]["kl"] == probe.measure({Site("keys", 0): False}).kl
    stored["rows"][0]["kl"] = 123.0  # known again by this
    file.write_text(json.dumps(stored))

    second = Results(SETTINGS, file)
    left = missing(sites, second, per_layer=True)
    assert list(measure_all(probe, left, second)) == [("keys", 1), ("down_input", 0), ("down_input", 1)]
    assert list(measure_all(probe, missing(sites, second, per_layer=False), second)) == [
        ("keys", None), ("down_input", None),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]
    third = Results(SETTINGS, file)
    assert third.unquantized == probe.unquantized and len(third.rows) == 6
    assert third.rows["down_input", None].effect == probe.measure(
        {Site("down_input", 0): False, Site("down_input", 1): False}
    )
    layered = third.worst_first(per_layer=True)
    assert layered[0].effect.kl == 123.0 and len(layered) == 4
    assert [row.effect.kl for row in layered] == sorted((row.effect.kl for row in layered), reverse=True)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ("{}", "holds no sensitivity measurements"),
        ('{"settings": {"model": "m", "recipe": "xyz"}, "rows": []}', "measurements with recipe xyz, not abc: remove"),
        ('{"settings": {"model": "m", "recipe": "abc"}, "unquantized": null, "rows": [{"kind": 3}]}', "is damaged"),
        ('{"settings": {"model": "m", "recipe": "abc"}, "rows": []}', "is damaged"),
    ],
)
def test_a_file_of_something_else(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(FPTQuantError, match=message) as caught:
        Results(SETTINGS, tmp_path / "s.json")
    assert "\n" not in str(caught.value) and (tmp_path / "s.json").read_text() == content


def test_plots(tmp_path: Path, drawn: None) -> None:
    results = Results(SETTINGS)
    for row in (Row("keys", None, Effect(0.2, 9)), Row("down_input", None, Effect(0.0, 8))):
        results.add(row)
    plot(results, tmp_path / "kinds.png", "model")
    results.add(Row("keys", 1, Effect(0.1, 9)))
    plot(results, tmp_path / "layers.svg", "model")
    assert (tmp_path / "kinds.png").stat().st_size > 5000 and "<svg" in (tmp_path / "layers.svg").read_text()
    with pytest.raises(FPTQuantError, match=r"'x.txt' has no known image type; known: .*png"):
        check_plot(tmp_path / "x.txt")
    with pytest.raises(FPTQuantError, match="is not a directory"):
        check_plot(tmp_path / "none" / "x.png")
