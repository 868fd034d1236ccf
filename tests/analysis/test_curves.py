"""The lines that charts draw: no pause, no peak lost, no box over another."""

import numpy as np
import pytest

from pdbench.analysis.curves import CURVE_POINTS, SPANS
from pdbench.analysis.run_analysis import analyze
from pdbench.records import DeviceRecord, DeviceSample
from tests.support.runs import build_run


def curves(run):
    return analyze(run).curves


def test_pauses_between_trials_are_left_out():
    run = build_run(trials=3, pause_s=1000.0)
    axis = curves(run).axis
    measured_s = sum(trial.end_s - trial.start_s for trial in run.trials)
    assert len(axis.stretches) == 3 and axis.length_s < measured_s + 3 * 2 + 1
    instants = np.array([run.trials[1].start_s, run.trials[1].end_s + 500.0])
    placed = axis.place(instants)
    assert axis.starts[1] <= placed[0] < axis.starts[2] and np.isnan(placed[1])
    assert all(start < end for start, end in axis.pauses) and len(axis.ticks) == len(axis.tick_labels)


def test_trials_close_together_share_a_stretch():
    assert len(curves(build_run(trials=3, pause_s=2.0)).axis.stretches) == 1


def test_seconds_begin_again_with_every_trial():
    for pause_s, joints in ((2.0, 2), (1000.0, 0)):
        run = build_run(trials=3, pause_s=pause_s)
        run.requests[0].sent_s = run.trials[0].start_s - 0.5  # a warm-up's
        axis = curves(run).axis
        assert len(axis.joints) == joints and axis.tick_labels.count("0") == 3
        zeros = [at for at, label in zip(axis.ticks, axis.tick_labels, strict=True) if label == "0"]
        begins = [min(r.sent_s for r in run.requests if r.trial == trial.index) for trial in run.trials]
        assert zeros == pytest.approx(sorted([*axis.starts, *axis.joints]))
        assert axis.place(np.array(begins)) - zeros == pytest.approx([1.0] * 3, abs=0.01)
        assert (np.diff(axis.ticks) > 0).all()


@pytest.mark.parametrize("step_s", [0.1, 1.0])
def test_line_is_broken_where_nothing_was_sampled(step_s):
    run = build_run(trials=2, pause_s=3.0 if step_s < 1 else 100.0, requests=40)
    instants = [t for trial in run.trials for t in np.arange(trial.start_s, trial.end_s, step_s)]
    samples = [DeviceSample(t_s=at, cpu_utilization_pct=50.0) for at in instants]
    run.devices = [DeviceRecord(id="p", kind="process", name="P", role="single", samples=samples)]
    line = curves(run).devices["cpu_utilization_pct"]["p"]
    assert np.isnan(line.y[:-1]).sum() == 1


def test_boxes_of_one_row_do_not_overlap():
    spans = curves(build_run(trials=1, requests=60, concurrency=7)).spans
    assert set(spans.row) == set(range(7))
    for row in range(7):
        here = np.argsort(spans.sent_s[spans.row == row])
        assert (spans.sent_s[spans.row == row][here][1:] >= spans.end_s[spans.row == row][here][:-1]).all()


def test_warm_up_and_failed_requests_are_drawn():
    run = build_run(trials=1, requests=8, failed=1)
    run.requests[1].warmup = True
    analysis = analyze(run)
    assert len(analysis.curves.spans.row) == 8 and analysis.curves.spans.failed.sum() == 1
    assert len(analysis.requests.id) == 7
    assert analysis.curves.in_flight.y.max() == 1


def test_many_requests_are_drawn_as_how_many_were_in_flight():
    run = build_run(trials=1, requests=SPANS + 1, tokens=2, concurrency=50, gpu=False)
    assert curves(run).spans is None and 45 < curves(run).in_flight.y.max() <= 50


def test_peaks_survive_thinning():
    run = build_run(trials=1, requests=4)
    start = run.trials[0].start_s
    samples = [DeviceSample(t_s=start + i / 1e4, power_w=100.0) for i in range(8000)]
    samples[4321].power_w, samples[5432].power_w = 700.0, 3.0
    run.devices = [DeviceRecord(id="gpu0", kind="gpu", name="G", role="single", samples=samples)]
    line = curves(run).devices["power_w"]["gpu0"]
    assert len(line.x) <= CURVE_POINTS + 10 and (np.nanmax(line.y), np.nanmin(line.y)) == (700, 3)


def test_devices_come_in_a_requests_order_and_what_is_missing_says_why():
    analysis = analyze(build_run())
    lines = analysis.curves
    assert [analysis.summary.devices[name].role for name in lines.devices["power_w"]] == ["prefill", "decode"]
    assert set(lines.not_measured) == {"cpu_utilization_pct", "cpu_clock_mhz"}
    assert curves(build_run(gpu=False)).not_measured["power_w"] == "RAPL zones are devices of their own"


def test_quantile_curve_passes_through_the_summary():
    analysis = analyze(build_run(requests=100))
    for name in ("ttft", "tbt", "mean_tbt", "e2e"):
        curve, spread = analysis.curves.quantiles[name], getattr(analysis.summary, f"{name}_ms")
        assert (curve.x[0], curve.x[-1], curve.y[-1]) == (spread.min, spread.max, 100)
        assert np.interp(90, curve.y, curve.x) == pytest.approx(spread.p90, rel=0.02)


def test_gaps_belong_to_their_requests():
    analysis = analyze(build_run(trials=1, requests=5, tokens=4, failed=1))
    gaps = analysis.curves.gaps
    assert len(gaps.ms) == 4 * 3 and set(gaps.request) == {1, 2, 3, 4}
    means = [gaps.ms[gaps.request == row].mean() for row in (1, 2, 3, 4)]
    assert means == pytest.approx(analysis.requests.mean_tbt_ms[1:])
