"""The two pictures: one run's performance analysis, and several runs side by side; drawn from saved runs alone.

Try: pdbench report disaggregated_results
"""

import io
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
from pdbench.report import fonts, panels
from pdbench.report.curves import series
from pdbench.report.energy_tables import roles_of
from pdbench.report.language import say
from pdbench.report.palette import BLUE, FAINT, GREEN, INK, MUTED, PAPER, PURPLE
from pdbench.report.rows import figure
from pdbench.report.timeline import Timeline

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
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


def style(language: str) -> Any:
    """matplotlib's settings for all pictures; for Chinese with this machine's font behind the usual one."""
    font = fonts.chinese_font() if language == "zh" else None
    return STYLE | {"font.family": [*STYLE["font.family"], font]} if font else STYLE


def performance_analysis(run: Run, path: Path, language: str = "en") -> Path:
    """Draw one run into `path` (PNG, 1600 x 1500): power, clocks, latencies a request, TTFT's and energy's parts, statistics."""
    measured = measure(run)
    summary = summarize(run, measured)
    with matplotlib.rc_context(style(language)):
        picture = Figure(figsize=(16, 15))
        grid = picture.add_gridspec(
            3, 1, height_ratios=(4.7, 2.7, 2.8), hspace=0.24, left=0.055, right=0.985, top=0.905, bottom=0.04
        )
        _heading(picture, run, measured, language)
        _time_panels(picture, grid[0], run, language)
        latencies = GridSpecFromSubplotSpec(1, 3, grid[1], wspace=0.16)
        for place, (title, values, shade, gaps) in enumerate(_latencies(measured)):
            _latency(picture, latencies[place], say(title, language), values, measured, shade, gaps, language)
        _statistics(picture, grid[2], run, measured, summary, language)
        _write(picture, path)
    return path


def _latencies(measured: Measured) -> list[tuple[str, Array, str, Array | None]]:
    return [
        ("TTFT, time to first token", measured.ttft_ms, BLUE, None),
        ("TBT, between tokens: every gap, and means", measured.mean_tbt_ms, GREEN, measured.tbt_ms),
        ("E2E, the whole request", measured.e2e_ms, PURPLE, None),
    ]


def _heading(picture: Figure, run: Run, measured: Measured, language: str) -> None:
    trials = len(measured.trials)
    words = "{0} requests in 1 trial, {2} failed" if trials == 1 else "{0} requests in {1} trials, {2} failed"
    counts = say(words, language).format(len(measured.requests), trials, int((~measured.ok).sum()))
    title = f"{run.name}: {say('performance and power', language)}"
    note = "" if _has_power(run) else f"{say('power not measured', language)}: {power_reasons(run)}"
    panels.heading(picture, title, {run.name: run}, language, counts, note)


def _has_power(run: Run) -> bool:
    return any(len(series(device, "power_w")[0]) for device in run.devices)


def _time_panels(picture: Figure, place: Any, run: Run, language: str) -> None:
    timeline, grid = Timeline(run), GridSpecFromSubplotSpec(2, 1, place, height_ratios=(1.8, 1), hspace=0.22)
    power, clock = picture.add_subplot(grid[0]), picture.add_subplot(grid[1])
    if _has_power(run) or not any(series(device, "cpu_utilization_pct")[0] for device in run.devices):
        title, field, unit = (
            "Power of each device, requests behind (darker until the first token)",
            "power_w",
            "power, W",
        )
    else:
        title = "CPU use of each role's processes, requests behind (darker until the first token)"
        field, unit = "cpu_utilization_pct", "% of one core"
    power.set_title(say(title, language))
    drawn = panels.device_curves(power, run, timeline, (field,), unit, language)
    panels.request_spans(power, run, timeline)
    panels.time_axis(power, timeline, False, language)
    if drawn:
        power.legend(loc="upper right", bbox_to_anchor=(1.0, 1.14), ncols=8)
    gpus = any(device.kind == "gpu" for device in run.devices)
    clock.set_title(say("Clocks (graphics solid, memory dashed)" if gpus else "CPU clock", language))
    fields = ("sm_clock_mhz", "memory_clock_mhz") if gpus else ("cpu_clock_mhz",)
    if panels.device_curves(clock, run, timeline, fields, "clock, MHz", language):
        clock.legend(loc="upper right", bbox_to_anchor=(1.0, 1.25), ncols=8)
    panels.time_axis(clock, timeline, True, language)


def _latency(
    picture: Figure,
    place: Any,
    title: str,
    values: Array,
    measured: Measured,
    shade: str,
    gaps: Array | None,
    language: str,
) -> None:
    cells = GridSpecFromSubplotSpec(1, 3, place, width_ratios=(4, 0.9, 0.6), wspace=0.03)
    dots = picture.add_subplot(cells[0])
    dots.set_title(title)
    if not measured.ok.any():
        panels.not_measured(dots, "no request succeeded", language)
        return
    panels.scatter(dots, values, measured, shade, language, gaps)
    panels.distribution(picture.add_subplot(cells[1], sharey=dots), values if gaps is None else gaps, shade)


def _statistics(
    picture: Figure, place: Any, run: Run, measured: Measured, summary: dict[str, Any], language: str
) -> None:
    cells = GridSpecFromSubplotSpec(1, 5, place, width_ratios=(0.27, 0.85, 0.13, 1.0, 1.25), wspace=0.14)
    metered = any(role["total_j"] for role in roles_of(summary).values())
    halves = GridSpecFromSubplotSpec(
        2 if metered else 1, 1, cells[1], hspace=0.62, height_ratios=(1.5, 1)[: 1 + metered]
    )
    parts = picture.add_subplot(halves[0])
    parts.set_title(say("Where TTFT goes", language), x=-0.33)
    panels.phase_bars(parts, measured, language)
    if metered:
        joules = picture.add_subplot(halves[1])
        joules.set_title(say("Where each role's energy goes", language), x=-0.33)
        panels.energy_bars(joules, summary, language)
    times = picture.add_subplot(cells[3])
    times.set_title(say("Times, ms", language))
    words = {"ttft_ms": "TTFT", "tbt_ms": say("TBT, every gap", language), "e2e_ms": "E2E"}
    phases = ("queue_ms", "prefill_ms", "kv_transfer_ms", "decode_ms")
    words |= {key: say(key, language) for key in phases if summary[key]}
    rows = [[word, *(_stat(summary[key], name) for name in _FIGURES)] for key, word in words.items()]
    panels.table(times, rows, ("", say("mean", language), *_FIGURES[1:]), (2.4, 1, 1, 1, 1))
    devices = picture.add_subplot(cells[4])
    devices.set_title(say("Throughput and devices, over the measured windows", language))
    header = ("", *(say(word, language) for word in ("mean", "min", "max", "energy")))
    panels.table(devices, _device_rows(summary, language), header, (3.2, 1, 1, 1, 1.2))


def _stat(figures: dict[str, float] | None, name: str) -> str:
    return figure(None if figures is None else figures[name])


def _device_rows(summary: dict[str, Any], language: str) -> list[list[str]]:
    speed, energy = summary["throughput"], summary["energy"]
    rows = [
        [say("output_tokens_per_s", language), figure(speed["output_tokens_per_s"]), "", "", ""],
        [say("requests/s", language), figure(speed["requests_per_s"]), "", "", ""],
    ]
    if energy["total_j"] is not None:
        rows.append([say("j_per_output_token", language), figure(energy["j_per_output_token"]), "", "", ""])
    split = summary["attribution"]
    for label, key in (
        ("prefill, J per prompt token", "j_per_computed_prompt_token"),
        ("decode, J per output token", "decode_j_per_output_token"),
    ):
        if split[key] is not None:
            rows.append([say(label, language), figure(split[key]), "", "", ""])
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
        rows.append(
            [
                f"{one['role'] or one['name']}, {say(unit, language)}",
                *spread,
                "–" if total is None else f"{figure(total)} J",
            ]
        )
    return rows


def _write(picture: Figure, path: Path) -> None:
    """The PNG at 100 dots an inch, moved into place whole."""
    canvas, data = FigureCanvasAgg(picture), io.BytesIO()
    canvas.print_figure(data, format="png", dpi=100)
    write_whole(Path(path), data.getvalue())


def comparison(runs: Sequence[Run], path: Path, language: str = "en") -> Path:
    """Draw several deployments side by side into `path` (PNG); see `comparison_figure`."""
    from pdbench.report.comparison_figure import draw

    with matplotlib.rc_context(style(language)):
        _write(draw(runs, language=language), path)
    return path
