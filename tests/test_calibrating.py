"""The loads of a calibration: what is sent, in which time, what is left after an interruption."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import calibrating, planning
from pdbench.config import DeploymentKind, LoadConfig, Options
from pdbench.errors import UserError
from pdbench.load.plan import check

KINDS: list[DeploymentKind] = ["single", "disaggregated"]
LOAD = LoadConfig(rate=1.0, ramp_to=10.0, input_tokens=64)
PLAN = calibrating.Schedule(2, 20.0, 100.0)


def test_lengths_are_spread_within_what_the_model_takes() -> None:
    load = calibrating.spread(LoadConfig(), 512)
    assert load.input_distribution == load.output_distribution == "lognormal"
    assert load.max_input_tokens and load.max_output_tokens and load.input_tokens
    assert load.max_input_tokens + load.max_output_tokens < 512
    given = LoadConfig(input_tokens=100, input_distribution="uniform", input_spread=0.3, max_output_tokens=50)
    load = calibrating.spread(given, 8192)
    assert (load.input_tokens, load.input_distribution, load.input_spread, load.max_output_tokens) == (
        100,
        "uniform",
        0.3,
        50,
    )


@pytest.mark.parametrize("load", [LoadConfig(concurrency=4), LoadConfig(rate=2.0), LoadConfig(phase="prefill")])
def test_options_that_the_calibration_decides_are_refused(load: LoadConfig) -> None:
    with pytest.raises(UserError, match=r"--(concurrency|rate|phase)"):
        calibrating.spread(load, 512)


@pytest.mark.parametrize("processes", [2, 12, 40])
def test_loads_of_fixed_streams_need_no_more_client_processes(processes: int) -> None:
    options = Options(load=replace(LOAD, client_processes=processes))
    points = calibrating.points("disaggregated", options, PLAN)
    for point in points:
        check(point.options.load)
    assert [point.options.load.client_processes for point in points[2:]] == [processes] * PLAN.ramps


def test_schedule_fits_the_time_or_is_refused() -> None:
    whole = calibrating.schedule(KINDS, 5, 60.0, 3600, on_gpu=True)
    assert (whole.ramps, whole.ramp_s) == (5, 60.0)
    short = calibrating.schedule(KINDS, 5, 60.0, 720, on_gpu=True)
    assert short.ramps == 5 and 20 <= short.ramp_s < 60 and short.expected_s <= 720
    fewer = calibrating.schedule(KINDS, 5, 60.0, 480, on_gpu=True)
    assert 2 <= fewer.ramps < 5 and fewer.ramp_s >= 20 and fewer.expected_s <= 480
    with pytest.raises(UserError, match="--max-minutes 5"):
        calibrating.schedule(KINDS, 5, 60.0, 300, on_gpu=True)


def test_a_ramp_with_too_few_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ramp-s 400"):
        calibrating.ramp(replace(LOAD, rate=0.1, ramp_to=0.1), tmp_path, "single")


def test_a_ramp_is_shorter_where_servers_started_late(tmp_path: Path) -> None:
    load = replace(LOAD, ramp_s=60.0)
    assert calibrating.ramp(load, tmp_path, "single", 33.33).ramp_s == 33.3
    assert calibrating.ramp(load, tmp_path, "single", -5.0).ramp_s == calibrating.LEAST_RAMP_S
    assert calibrating.ramp(load, tmp_path, "single").ramp_s == 60


def test_what_fails_leaves_a_gap_and_the_next_deployment_goes_on(tmp_path: Path) -> None:
    sent: list[tuple[str, str]] = []

    def measure(kind: DeploymentKind, options: Options, folder: Path, deadline: calibrating.Deadline) -> Path:
        sent.append((kind, folder.name))
        if kind == "single":
            raise UserError("its server died")
        results = folder / f"{kind}_results"
        results.mkdir()
        (results / f"{kind}_results.json").write_text("{}")
        return results

    load = replace(LOAD, ramp_s=20.0)
    run = partial(calibrating.run, KINDS, Options(load=load), PLAN, 3600, tmp_path, measure, Console(quiet=True))
    found, gaps = run()
    assert len(found) == 4 and {path.name for path in found} == {"disaggregated_results"}
    assert gaps == ["single (full, ramp-1, ramp-2): its server died"]
    sent.clear()
    run()
    assert {kind for kind, _ in sent} == {"single"}, "the same command tries what failed again"
    with pytest.raises(UserError, match="other options"):
        calibrating.run(KINDS, Options(), PLAN, 3600, tmp_path, measure, Console(quiet=True))


def test_it_resumes_and_stops_when_the_time_is_up(tmp_path: Path) -> None:
    sent: list[tuple[str, str]] = []
    stop = 6

    def measure(kind: DeploymentKind, options: Options, folder: Path, deadline: calibrating.Deadline) -> Path:
        sent.append((kind, folder.name))
        results = folder / f"{kind}_results"
        results.mkdir()
        (results / f"{kind}_results.json").write_text("{}")
        if len(sent) == stop:
            raise KeyboardInterrupt
        load = options.load
        assert (load.concurrency is None) == folder.name.startswith("load=ramp")
        assert (load.phase == "prefill") == (folder.name == "load=burst")
        return results

    def run(limit_s: float) -> list[Path]:
        return calibrating.run(KINDS, Options(load=LOAD), PLAN, limit_s, tmp_path, measure, Console(quiet=True))[0]

    with pytest.raises(KeyboardInterrupt):
        run(3600)
    loads = ["load=full", "load=ramp-1", "load=ramp-2", "load=full", "load=burst", "load=ramp-1", "load=ramp-2"]
    assert [name for _, name in sent] == loads[:6]
    words = calibrating.saved(tmp_path)
    cut_short = tmp_path / "load=ramp-1" / f"{KINDS[-1]}_results"
    assert "5 loads are saved" in words and f"{cut_short} has what was measured" in words
    found = run(3600)
    assert [path.parent.name for path in found] == loads
    assert [name for _, name in sent[6:]] == loads[5:]
    assert [path.parent.name for path in run(0.0)] == ["load=full", "load=full"]
    assert calibrating.Deadline(0.0).decided() and not calibrating.Deadline(1e12).decided()


def test_more_time_adds_to_what_was_measured_in_less(tmp_path: Path) -> None:
    ramps: list[tuple[str, float]] = []

    def measure(kind: DeploymentKind, options: Options, folder: Path, deadline: calibrating.Deadline) -> Path:
        if folder.name.startswith("load=ramp"):
            ramps.append((folder.name, options.load.ramp_s))
        results = folder / f"{kind}_results"
        results.mkdir()
        (results / f"{kind}_results.json").write_text("{}")
        return results

    for plan in (PLAN, calibrating.Schedule(3, 40.0, 200.0)):
        calibrating.run(["single"], Options(load=LOAD), plan, 3600, tmp_path, measure, Console(quiet=True))
    assert ramps == [("load=ramp-1", 20.0), ("load=ramp-2", 20.0), ("load=ramp-3", 40.0)]
    measured = calibrating.points("single", Options(load=replace(LOAD, ramp_s=300.0)), PLAN)[0]
    assert measured.options == calibrating.points("single", Options(load=LOAD), PLAN)[0].options


def test_loads_that_plan_refuses_are_left_out(tmp_path: Path) -> None:
    console = Console(quiet=True)
    with pytest.raises(UserError, match="no run is left that calibrates"):
        planning.suitable_runs([tmp_path / "nothing_results"], console)
