"""The two pictures: one run's performance analysis, and several runs side by side; drawn from saved runs alone.

Try: pdbench report disaggregated_results
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec

from pdbench.analysis.metrics import Array, Measured, measure
from pdbench.analysis.summary import power_reasons, summarize
from pdbench.records import Run, write_whole
from pdbench.report import panels
from pdbench.report.curves import series
from pdbench.report.energy_tables import roles_of
from pdbench.report.palette import BAD, BLUE, FAINT, GOOD, GREEN, INK, MUTED, PAPER, PURPLE
from pdbench.report.rows import figure
from pdbench.report.timeline import Timeline
from pdbench.report.words import load_in_words, machine_in_words

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#b8c0ca",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": PAPER,
    "text.parse_math": False,
}


_FIGURES = ("mean", "p50", "p90", "p99")


def performance_analysis(run: Run, path: Path) -> Path:
    """Draw one run into `path` (PNG, 1600 x 1500): power, clocks, latencies a request, TTFT's and energy's parts, statistics."""
    measured = measure(run)
    summary = summarize(run, measured)
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(16, 15))
        grid = picture.add_gridspec(
            3, 1, height_ratios=(4.7, 2.7, 2.8), hspace=0.24, left=0.055, right=0.985, top=0.905, bottom=0.04
        )
        _heading(picture, run, measured)
        _time_panels(picture, grid[0], run)
        latencies = GridSpecFromSubplotSpec(1, 3, grid[1], wspace=0.16)
        for place, (title, values, shade, gaps) in enumerate(_latencies(measured)):
            _latency(picture, latencies[place], title, values, measured, shade, gaps)
        _statistics(picture, grid[2], run, measured, summary)
        _write(picture, path)
    return path


def _latencies(measured: Measured) -> list[tuple[str, Array, str, Array | None]]:
    return [
        ("TTFT, time to first token", measured.ttft_ms, BLUE, None),
        ("TBT, between tokens: every gap, and means", measured.mean_tbt_ms, GREEN, measured.tbt_ms),
        ("E2E, the whole request", measured.e2e_ms, PURPLE, None),
    ]


def _heading(picture: Figure, run: Run, measured: Measured) -> None:
    failed = int((~measured.ok).sum())
    trials = f"{len(measured.trials)} trial" + ("s" if len(measured.trials) != 1 else "")
    counts = f"{len(measured.requests)} requests in {trials}, {failed} failed"
    picture.text(
        0.055, 0.982, f"{run.name}: performance and power", fontsize=19, fontweight="bold", color=INK, va="top"
    )
    picture.text(0.055, 0.960, f"{load_in_words(run)}  ·  {counts}", fontsize=11, color=INK, va="top")
    picture.text(0.055, 0.944, machine_in_words(run), fontsize=10, color=MUTED, va="top")
    gate = run.gate
    if gate is not None:
        word = "correctness gate passed" if gate.passed else "CORRECTNESS GATE FAILED"
        shade = GOOD if gate.passed else BAD
        picture.text(0.985, 0.982, word, fontsize=11, fontweight="bold", color=shade, ha="right", va="top")
    if run.flags:
        names = ", ".join(dict.fromkeys(flag.name for flag in run.flags))
        picture.text(0.985, 0.962, f"mind: {names}", fontsize=11, fontweight="bold", color=BAD, ha="right", va="top")


def _time_panels(picture: Figure, place: Any, run: Run) -> None:
    timeline, grid = Timeline(run), GridSpecFromSubplotSpec(2, 1, place, height_ratios=(1.8, 1), hspace=0.22)
    power, clock = picture.add_subplot(grid[0]), picture.add_subplot(grid[1])
    has_power = any(len(series(device, "power_w")[0]) for device in run.devices)
    if has_power or not any(series(device, "cpu_utilization_pct")[0] for device in run.devices):
        power.set_title("Power of each device, requests behind (darker until the first token)")
        drawn = panels.device_curves(power, run, timeline, ("power_w",), "power, W")
    else:
        power.set_title("CPU use of each role's processes, requests behind (darker until the first token)")
        picture.text(
            0.985, 0.944, f"power not measured: {power_reasons(run)}", fontsize=10, color=MUTED, ha="right", va="top"
        )
        drawn = panels.device_curves(power, run, timeline, ("cpu_utilization_pct",), "% of one core")
    panels.request_spans(power, run, timeline)
    panels.time_axis(power, timeline, label=False)
    if drawn:
        power.legend(loc="upper right", bbox_to_anchor=(1.0, 1.14), ncols=8)
    gpus = any(device.kind == "gpu" for device in run.devices)
    clock.set_title("Clocks (graphics solid, memory dashed)" if gpus else "CPU clock")
    fields = ("sm_clock_mhz", "memory_clock_mhz") if gpus else ("cpu_clock_mhz",)
    if panels.device_curves(clock, run, timeline, fields, "clock, MHz"):
        clock.legend(loc="upper right", bbox_to_anchor=(1.0, 1.25), ncols=8)
    panels.time_axis(clock, timeline, label=True)


def _latency(
    picture: Figure, place: Any, title: str, values: Array, measured: Measured, shade: str, gaps: Array | None
) -> None:
    cells = GridSpecFromSubplotSpec(1, 3, place, width_ratios=(4, 0.9, 0.6), wspace=0.03)
    dots = picture.add_subplot(cells[0])
    dots.set_title(title)
    if not measured.ok.any():
        panels.not_measured(dots, "no request succeeded")
        return
    panels.scatter(dots, values, measured, shade, gaps)
    panels.distribution(picture.add_subplot(cells[1], sharey=dots), values if gaps is None else gaps, shade)


def _statistics(picture: Figure, place: Any, run: Run, measured: Measured, summary: dict[str, Any]) -> None:
    cells = GridSpecFromSubplotSpec(1, 5, place, width_ratios=(0.27, 0.85, 0.13, 1.0, 1.25), wspace=0.14)
    metered = any(role["total_j"] for role in roles_of(summary).values())
    halves = GridSpecFromSubplotSpec(
        2 if metered else 1, 1, cells[1], hspace=0.62, height_ratios=(1.5, 1)[: 1 + metered]
    )
    parts = picture.add_subplot(halves[0])
    parts.set_title("Where TTFT goes", x=-0.33)
    panels.phase_bars(parts, measured)
    if metered:
        joules = picture.add_subplot(halves[1])
        joules.set_title("Where each role's energy goes", x=-0.33)
        panels.energy_bars(joules, summary)
    times = picture.add_subplot(cells[3])
    times.set_title("Times, ms")
    words = {"ttft_ms": "TTFT", "tbt_ms": "TBT, every gap", "e2e_ms": "E2E"}
    phases = {"queue_ms": "queue", "prefill_ms": "prefill", "kv_transfer_ms": "KV transfer", "decode_ms": "decode"}
    words |= {key: word for key, word in phases.items() if summary[key]}
    rows = [[word, *(_stat(summary[key], name) for name in _FIGURES)] for key, word in words.items()]
    panels.table(times, rows, ("", *_FIGURES), (2.4, 1, 1, 1, 1))
    devices = picture.add_subplot(cells[4])
    devices.set_title("Throughput and devices, over the measured windows")
    panels.table(devices, _device_rows(summary), ("", "mean", "min", "max", "energy"), (3.2, 1, 1, 1, 1.2))


def _stat(figures: dict[str, float] | None, name: str) -> str:
    return figure(None if figures is None else figures[name])


def _device_rows(summary: dict[str, Any]) -> list[list[str]]:
    speed, energy = summary["throughput"], summary["energy"]
    rows = [
        ["output tokens/s", figure(speed["output_tokens_per_s"]), "", "", ""],
        ["requests/s", figure(speed["requests_per_s"]), "", "", ""],
    ]
    if energy["total_j"] is not None:
        rows.append(["J per output token", figure(energy["j_per_output_token"]), "", "", ""])
    split = summary["attribution"]
    for label, key in (
        ("prefill, J per prompt token", "j_per_computed_prompt_token"),
        ("decode, J per output token", "decode_j_per_output_token"),
    ):
        if split[key] is not None:
            rows.append([label, figure(split[key]), "", "", ""])
    for one in list(summary["devices"].values())[:5]:
        use = (
            "power_w"
            if one["power_w"]
            else "gpu_utilization_pct"
            if one["gpu_utilization_pct"]
            else "cpu_utilization_pct"
        )
        unit = {"power_w": "W", "gpu_utilization_pct": "% of GPU", "cpu_utilization_pct": "% of a core"}[use]
        total = one["energy"]["counter_j"] if one["energy"]["counter_j"] is not None else one["energy"]["integral_j"]
        spread = [_stat(one[use], name) for name in ("mean", "min", "max")]
        rows.append([f"{one['role'] or one['name']}, {unit}", *spread, "–" if total is None else f"{figure(total)} J"])
    return rows


def _write(picture: Figure, path: Path) -> None:
    """The PNG at 100 dots an inch, moved into place whole."""
    import io

    canvas, data = FigureCanvasAgg(picture), io.BytesIO()
    canvas.print_figure(data, format="png", dpi=100)
    write_whole(Path(path), data.getvalue())


def comparison(runs: Sequence[Run], path: Path) -> Path:
    """Draw several deployments side by side into `path` (PNG); see `comparison_figure`."""
    from pdbench.report.comparison_figure import draw

    with matplotlib.rc_context(STYLE):
        _write(draw(runs), path)
    return path
