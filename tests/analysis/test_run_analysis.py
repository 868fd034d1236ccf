"""An analysis is read back as it was saved, and made again when it is not that of the results beside it."""

import msgspec
import numpy as np
import pytest

from pdbench.analysis import run_analysis
from pdbench.analysis.run_analysis import FILE, analyze, load_analysis, save_analysis
from pdbench.errors import UserError
from pdbench.records import Flag, load_run, save_run
from tests.support.runs import build_run


def equal(a, b) -> bool:
    """The same numbers everywhere, NaN like NaN; `source` aside, which only a saved one has."""
    encoded = (msgspec.structs.replace(item, source="") for item in (a, b))
    first, second = (msgspec.json.encode(item, enc_hook=np.ndarray.tolist) for item in encoded)
    return first == second


@pytest.fixture
def folder(tmp_path):
    run = build_run(requests=4, failed=1)
    run.requests[1].phases["queue"] = None
    save_run(run, tmp_path)
    return tmp_path


def count_analyses(monkeypatch) -> list[str]:
    counted = []
    analyze = run_analysis.analyze
    monkeypatch.setattr(run_analysis, "analyze", lambda run: (counted.append(run.name), analyze(run))[1])
    return counted


def test_saved_analysis_is_read_back_without_the_run(folder, monkeypatch):
    analysis = analyze(load_run(folder))
    save_analysis(analysis, folder)
    monkeypatch.setattr(run_analysis, "load_run", None)
    again = load_analysis(folder)
    assert equal(again, analysis) and again.source
    assert np.isnan(again.requests.ttft_ms[0]) and again.requests.error[0] == "timeout"


def test_folder_is_analyzed_once(folder, monkeypatch):
    counted = count_analyses(monkeypatch)
    assert equal(load_analysis(folder), load_analysis(folder))
    assert counted == ["disaggregated"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: save_run(build_run(requests=4, seed=1), folder),
        lambda folder: [path.unlink() for path in folder.glob("*_gpu_data.json")],
        lambda folder: (folder / FILE).write_text((folder / FILE).read_text().replace("analysis/", "analysis/0")),
        lambda folder: (folder / FILE).write_text((folder / FILE).read_text()[:1000]),
        lambda folder: (folder / FILE).write_text((folder / FILE).read_text().replace('"p50":', '"p50":1', 1)),
        lambda folder: (folder / FILE).unlink(),
    ],
    ids=["other results", "other devices", "other schema", "half a file", "edited figure", "no file"],
)
def test_analysis_that_is_not_of_these_results_is_made_again(folder, monkeypatch, change):
    load_analysis(folder)
    change(folder)
    counted = count_analyses(monkeypatch)
    assert equal(load_analysis(folder), analyze(load_run(folder)))
    assert equal(load_analysis(folder), analyze(load_run(folder)))
    assert counted == ["disaggregated"]


def test_analysis_of_another_code_is_made_again(folder, monkeypatch):
    """Of one version number there are many commits."""
    load_analysis(folder)
    counted = count_analyses(monkeypatch)
    monkeypatch.setattr(run_analysis, "_code", lambda: b"another")
    assert equal(load_analysis(folder), analyze(load_run(folder))) and counted == ["disaggregated"]


def test_folder_that_takes_no_file_is_analyzed_all_the_same(folder, monkeypatch):
    def refuse(path, data):
        raise UserError("cannot write")

    monkeypatch.setattr(run_analysis, "write_whole", refuse)
    assert equal(load_analysis(folder), analyze(load_run(folder)))


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="pdbench run"):
        load_analysis(tmp_path)


def test_analysis_leaves_the_run_as_it_is(folder):
    run = load_run(folder)
    before = msgspec.json.encode(run)
    analysis = analyze(run)
    analysis.flags.append(Flag("name", "detail"))
    assert msgspec.json.encode(run) == before


def test_summary_is_plain_data():
    summary = msgspec.to_builtins(analyze(build_run(trials=1)).summary)
    assert msgspec.json.decode(msgspec.json.encode(summary)) == summary
    assert {"ttft_ms", "tbt_ms", "mean_tbt_ms", "throughput", "energy", "devices"} <= summary.keys()


@pytest.mark.parametrize(
    "run",
    [
        build_run(trials=0),
        build_run(trials=1, requests=1),
        build_run(trials=1, requests=2, tokens=1),
        build_run(trials=1, requests=3, failed=3),
        build_run(gpu=False),
    ],
    ids=["empty", "one request", "one token", "all failed", "CPU"],
)
def test_every_kind_of_run_has_an_analysis(run, tmp_path):
    save_run(run, tmp_path)
    analysis = load_analysis(tmp_path)
    assert equal(load_analysis(tmp_path), analysis) and analysis.name == run.name
