"""Pictures of devices alone, from `pdbench monitor`'s file or a run's *_gpu_data.json: power, clocks, temperature.

Try: pdbench monitor --duration 10 --out power.json && pdbench plot power.json
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdbench.analysis.energy import power_curve
from pdbench.errors import UserError
from pdbench.records import DeviceRecord, DeviceSample, load_devices, write_whole
from pdbench.report.figures import STYLE
from pdbench.report.palette import MUTED, colours

_UTILIZATION = ("gpu_utilization_pct", "cpu_utilization_pct")


def plot(source: Path, picture: Path | None = None) -> Path:
    """Draw the devices of `source` (a .json or .csv file, or a run's folder) into a PNG beside it; returns its path."""
    devices = [device for device in read_devices(source) if device.samples]
    if not devices:
        raise UserError(f"{source} has no samples to draw: it was measured where no device could be read")
    picture = picture or (source / "devices.png" if source.is_dir() else source.with_suffix(".png"))
    device_figure(devices, source.name, picture)
    return picture


def read_devices(source: Path) -> list[DeviceRecord]:
    """The devices of a file or folder. Raises UserError when it holds none."""
    if source.is_dir():
        files = sorted(source.glob("*_gpu_data.json"))
        if not files:
            raise UserError(f"no *_gpu_data.json in {source}: name a results folder of a run that sampled its devices")
        return [device for file in files for device in load_devices(file)]
    return _read_csv(source) if source.suffix == ".csv" else load_devices(source)


def device_figure(devices: Sequence[DeviceRecord], title: str, picture: Path) -> None:
    """Four panels, 1500 x 1000: power with utilisation behind it, clocks, temperature, power against utilisation."""
    shades = dict(zip([device.id for device in devices], colours([d.role or d.id for d in devices]), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 10))
        grid = figure.add_gridspec(2, 2, left=0.055, right=0.975, top=0.885, bottom=0.06, hspace=0.28, wspace=0.22)
        figure.text(0.055, 0.955, f"Devices of {title}", fontsize=15, fontweight="bold")
        figure.text(0.055, 0.93, _subtitle(devices), color=MUTED, fontsize=10)
        _power(figure.add_subplot(grid[0, 0]), devices, shades)
        _lines(figure.add_subplot(grid[0, 1]), devices, shades, "Clocks", "MHz", _CLOCKS)
        _lines(figure.add_subplot(grid[1, 0]), devices, shades, "Temperature", "°C", {"temperature_c": ("-", "")})
        _scatter(figure.add_subplot(grid[1, 1]), devices, shades)
        data = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(data, format="png", dpi=100)
    write_whole(picture, data.getvalue())


_CLOCKS = {
    "sm_clock_mhz": ("-", "SM"),
    "memory_clock_mhz": ("--", "memory"),
    "cpu_clock_mhz": ("-", "CPU"),
}


def _power(axis: Axes, devices: Sequence[DeviceRecord], shades: dict[str, str]) -> None:
    """Lines of power over filled utilisation, whose axis is on the right."""
    axis.set_title("Power, with utilisation behind it")
    behind = axis.twinx()
    behind.grid(visible=False)
    behind.set_zorder(axis.get_zorder() - 1)
    axis.patch.set_visible(False)
    highest = 0.0
    # Beside GPUs the host's CPU use would be the larger surface and say less.
    behind_it = [device for device in devices if device.kind == "gpu"] or devices
    for device in devices:
        t, power = _columns(power_curve(device))
        if len(t):
            axis.plot(t, power, color=shades[device.id], lw=1.1, label=_label(device))
            highest = max(highest, float(power.max()))
    for device in behind_it:
        t, used = _utilization(device)
        if len(t):
            behind.fill_between(t, used, color=shades[device.id], alpha=0.16, lw=0, step="mid")
            behind.plot(t, used, color=shades[device.id], lw=0.6, alpha=0.4, drawstyle="steps-mid")
    top = max([100.0, *(float(_utilization(d)[1].max(initial=0)) for d in behind_it)])
    behind.set_ylim(0, top * 1.05)
    behind.set_ylabel("GPU utilisation %" if behind_it is not devices else "CPU use, % of one core")
    axis.set_xlabel("s")
    if not highest:
        _say(axis, "power not measured:\n" + _reasons(devices, "power_w"))
        return
    axis.set_ylim(0, highest * 1.15)
    axis.set_ylabel("W")
    axis.legend(loc="upper right", ncols=2)


def _lines(
    axis: Axes,
    devices: Sequence[DeviceRecord],
    shades: dict[str, str],
    title: str,
    unit: str,
    fields: dict[str, tuple[str, str]],
) -> None:
    """One line a device and field, from zero for clocks, close up for temperature."""
    axis.set_title(title)
    for device in devices:
        for field, (style, word) in fields.items():
            t, values = _columns([(s.t_s, v) for s in device.samples if (v := getattr(s, field)) is not None])
            if len(t):
                axis.plot(t, values, style, color=shades[device.id], lw=1.3, label=f"{_label(device)} {word}".strip())
    axis.set_xlabel("s")
    if not axis.lines:
        _say(axis, f"{title.lower()} not measured:\n" + _reasons(devices, next(iter(fields))))
        return
    low, high = axis.get_ylim()
    axis.set_ylim(0 if unit == "MHz" else low - 2, high * 1.12 if unit == "MHz" else high + 4)
    axis.set_ylabel(unit)
    axis.legend(loc="upper right", ncols=2)


def _scatter(axis: Axes, devices: Sequence[DeviceRecord], shades: dict[str, str]) -> None:
    """A point a sample; power is the device's 1 s mean where it has one, for utilisation is a mean as well."""
    axis.set_title("Power against utilisation")
    axis.set_xlabel("utilisation %")
    axis.set_ylabel("W")
    for device in devices:
        points = []
        for sample in device.samples:
            used = next((v for name in _UTILIZATION if (v := getattr(sample, name)) is not None), None)
            power = sample.power_w if sample.power_average_w is None else sample.power_average_w
            if used is not None and power is not None:
                points.append((used, power))
        x, y = _columns(points)
        if len(x):
            axis.scatter(x, y, s=14, alpha=0.45, color=shades[device.id], lw=0, label=_label(device))
    if not axis.collections:
        _say(axis, "no device has both:\n" + _reasons(devices, "power_w"))
        return
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=-2)
    axis.legend(loc="lower right")


def _utilization(device: DeviceRecord) -> tuple[Any, Any]:
    for name in _UTILIZATION:
        points = [(s.t_s, value) for s in device.samples if (value := getattr(s, name)) is not None]
        if points:
            return _columns(points)
    return _columns([])


def _columns(points: Sequence[tuple[float, float]]) -> tuple[Any, Any]:
    return np.array([a for a, _ in points]), np.array([b for _, b in points])


def _label(device: DeviceRecord) -> str:
    return device.id if device.role is None else f"{device.role} ({device.id})"


def _subtitle(devices: Sequence[DeviceRecord]) -> str:
    names = dict.fromkeys(device.name for device in devices)
    intervals = [v for device in devices if (v := device.sampling.get("p50_ms")) is not None]
    fine = [v for device in devices if (v := device.sampling.get("fine_interval_ms")) is not None]
    parts = [" · ".join(names)]
    parts += [f"samples every {np.median(intervals):.0f} ms"] if intervals else []
    parts += [f"power curve every {np.median(fine):.0f} ms"] if fine else []
    return " · ".join(parts)


def _reasons(devices: Sequence[DeviceRecord], field: str) -> str:
    reasons = dict.fromkeys(device.not_measured.get(field, "this device has none") for device in devices)
    return "\n".join(reasons)


def _say(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=MUTED)
    axis.set_yticks([])
    axis.grid(visible=False)


def _read_csv(path: Path) -> list[DeviceRecord]:
    """monitor's CSV back as devices; the fine curve is not in a CSV."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        devices: dict[str, DeviceRecord] = {}
        for row in rows:
            cells: dict[str, Any] = {k: v for k, v in row.items() if k in DeviceSample.__struct_fields__ and v}
            if "throttle" in cells:
                cells["throttle"] = cells["throttle"].split()
            device = DeviceRecord(id=row["device"], kind=row["kind"], name=row["name"])
            samples = devices.setdefault(row["device"], device).samples
            samples.append(msgspec.convert(cells, DeviceSample, strict=False))
    except FileNotFoundError:
        raise UserError(f"no file {path}: `pdbench monitor --out FILE` writes one") from None
    except (KeyError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path} is not monitor's CSV ({error}): name a file that `pdbench monitor` wrote") from None
    return list(devices.values())
