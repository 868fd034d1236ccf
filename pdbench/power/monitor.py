"""The sampler alone: a live table in the terminal, and everything read as JSON or CSV when it ends.

Try: pdbench monitor --duration 10 --out power.json, then pdbench plot power.json
"""

import csv
import io
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pdbench.errors import UserError
from pdbench.power.devices import open_host
from pdbench.power.reader import Reader
from pdbench.power.sampler import Sampler
from pdbench.records import Clock, DeviceRecord, DeviceSample, save_devices, write_whole

COLUMNS = {
    "power_w": "power W",
    "power_average_w": "1 s mean W",
    "sm_clock_mhz": "SM MHz",
    "memory_clock_mhz": "memory MHz",
    "gpu_utilization_pct": "GPU %",
    "temperature_c": "°C",
    "memory_used_mib": "memory MiB",
    "power_limit_w": "limit W",
    "cpu_utilization_pct": "CPU %",
    "cpu_clock_mhz": "CPU MHz",
}
CSV_HEAD = ("device", "kind", "name", *DeviceSample.__struct_fields__)


def monitor(
    gpus: Sequence[int] | None, interval_s: float, duration_s: float | None, out: Path | None, console: Console
) -> list[DeviceRecord]:
    """Watch the named GPUs (None: all), RAPL and the host's CPU for `duration_s` seconds or until Ctrl-C or SIGTERM.

    `out` ends in .json (everything) or .csv (the samples). Raises UserError for another ending.
    """
    if out is not None and out.suffix not in (".json", ".csv"):
        raise UserError(f"--out {out} must end in .json (everything) or .csv (the samples alone)")
    before = signal.signal(signal.SIGTERM, _interrupt)
    sampler = Sampler(open_host(gpus), interval_s, Clock.start())
    try:
        with sampler, Live(console=console, refresh_per_second=4, transient=True) as live:
            end = None if duration_s is None else time.monotonic() + duration_s
            while end is None or time.monotonic() < end:
                live.update(_live_table(sampler.latest()))
                time.sleep(0.25 if end is None else max(0.0, min(0.25, end - time.monotonic())))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    records = sampler.records()
    console.print(summary_table(records))
    for record in records:
        for field, reason in record.not_measured.items():
            console.print(f"{record.id}: {field} not measured: {reason}", style="dim", highlight=False)
    if out is not None:
        save_devices(out, "monitor", records) if out.suffix == ".json" else write_whole(out, as_csv(records))
        console.print(f"written to {out}; `pdbench plot {out}` draws it", highlight=False)
    return records


def as_csv(records: Sequence[DeviceRecord]) -> bytes:
    """One line a sample, empty where not measured; throttle reasons with spaces between."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for record in records:
        for sample in record.samples:
            cells = [getattr(sample, field) for field in DeviceSample.__struct_fields__]
            writer.writerow([record.id, record.kind, record.name, *(_cell(value) for value in cells)])
    return text.getvalue().encode()


def summary_table(records: Sequence[DeviceRecord]) -> Table:
    """Each device's mean, range and achieved interval; the counter's joules between its first and last tick."""
    table = Table(title="mean (min - max)", title_justify="left")
    shown = [field for field in COLUMNS if any(field in record.statistics for record in records)]
    for name in ("device", *(COLUMNS[field] for field in shown), "energy J", "interval p50 / p99 / max ms"):
        table.add_column(name, justify="left" if name == "device" else "right")
    for record in records:
        cells = []
        for field in shown:
            found = record.statistics.get(field)
            cells.append("-" if not found else f"{found['avg']:.0f} ({found['min']:.0f} - {found['max']:.0f})")
        timing = [record.sampling.get(name) for name in ("p50_ms", "p99_ms", "largest_gap_ms")]
        table.add_row(record.id, *cells, _joules(record), " / ".join("-" if v is None else f"{v:.0f}" for v in timing))
    return table


def _joules(record: DeviceRecord) -> str:
    ticks = record.energy_ticks or [(s.t_s, s.energy_j) for s in record.samples if s.energy_j is not None]
    if len(ticks) < 2:
        return "-"
    (start_s, start_j), (end_s, end_j) = ticks[0], ticks[-1]
    return f"{end_j - start_j:.0f} in {end_s - start_s:.1f} s"


def _live_table(latest: Sequence[tuple[Reader, DeviceSample | None]]) -> Table:
    table = Table(caption="Ctrl-C ends it")
    shown = [field for field in COLUMNS if any(sample and getattr(sample, field) is not None for _, sample in latest)]
    for name in ("device", "name", *(COLUMNS[field] for field in shown), "throttle"):
        table.add_column(name, justify="left" if name in ("device", "name", "throttle") else "right")
    for reader, sample in latest:
        values = [getattr(sample, field) if sample else None for field in shown]
        throttle = " ".join(sample.throttle or []) if sample else reader.not_measured.get("device", "")
        table.add_row(reader.id, reader.name, *("-" if v is None else f"{v:.0f}" for v in values), throttle)
    return table


def _cell(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)
    return " ".join(value) if isinstance(value, list) else value


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
