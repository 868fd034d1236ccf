"""`pdbench monitor`: the sampler alone, with a live table in the terminal, and all readings as JSON or CSV at its end."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from pdbench.analysis.meter import EnergyWindow, Meter, with_mean_power
from pdbench.errors import OptionError
from pdbench.files import check_writable, hold, save_somewhere, write_whole
from pdbench.power.device import open_host
from pdbench.power.sampler import Sampler, merge_records
from pdbench.records import Clock, DeviceRecord, DeviceSample, save_devices
from pdbench.report.tables import Table, Terminal, Value, csv_text

COLUMNS = {
    "power_w": "power W",
    "power_average_w": "1 s mean W",
    "module_power_w": "module W",
    "memory_power_w": "memory W",
    "sm_clock_mhz": "SM MHz",
    "memory_clock_mhz": "memory MHz",
    "gpu_utilization_pct": "GPU %",
    "temperature_c": "°C",
    "memory_used_mib": "memory MiB",
    "power_limit_w": "limit W",
    "cpu_utilization_pct": "CPU %",
    "cpu_clock_mhz": "CPU MHz",
}


def monitor(
    gpus: Sequence[int] | None, interval_s: float, duration_s: float | None, out: Path | None, console: Console
) -> None:
    """Watch the named GPUs (None: all), RAPL and the host's CPU for `duration_s` seconds or until Ctrl-C.

    `out` ends in .json (everything) or .csv (the samples). Raises UserError, before it begins, for another suffix and where
    nothing can be written.
    """
    if out is not None:
        if out.suffix not in (".json", ".csv"):
            raise OptionError(f"--out {out} must end in .json (everything) or .csv (the samples alone)")
        check_writable(out.parent)
    with hold(out.parent, out.name) if out else nullcontext():
        readers = open_host(gpus)
        sampler, clock = Sampler(readers, interval_s), Clock.start()
        with suppress(KeyboardInterrupt), sampler, Live(console=console, refresh_per_second=4, transient=True) as live:
            console.print(f"watching {', '.join(reader.id for reader in readers)}; Ctrl-C ends it")
            end = math.inf if duration_s is None else time.monotonic() + duration_s
            while time.monotonic() < end:
                live.update(Terminal(live_table(sampler.latest())))
                time.sleep(max(0.0, min(0.25, end - time.monotonic())))
        records = [with_mean_power(record) for record in merge_records(sampler.take(), clock.of_monotonic)]
        console.print(Terminal(summary_table(records)))
        for record in records:
            for field, reason in record.not_measured.items():
                console.print(f"{record.id}: {field} not measured: {escape(reason)}", style="dim")
        if out is not None:

            def save(path: Path) -> None:
                save_devices(path, "monitor", records) if path.suffix == ".json" else write_whole(path, as_csv(records))

            _, problem = save_somewhere(save, out)
            if problem:
                raise problem
            console.print(f"written to {out}; `pdbench plot {out}` draws it", markup=False)


def as_csv(records: Sequence[DeviceRecord]) -> bytes:
    """One line per sample, empty where not measured; throttle reasons with spaces between."""
    rows: list[list[object]] = [["device", "kind", "name", *DeviceSample.__struct_fields__]]
    for record in records:
        for sample in record.samples:
            values = [getattr(sample, field) for field in DeviceSample.__struct_fields__]
            values = [round(value, 6) if isinstance(value, float) else value for value in values]
            cells = [" ".join(value) if isinstance(value, list) else value for value in values]
            rows.append([record.id, record.kind, record.name, *cells])
    return csv_text(rows).encode()


def summary_table(records: Sequence[DeviceRecord]) -> Table:
    """One column per device: each field's mean and range, the joules, the achieved interval."""
    # Fields go down and devices across: eight GPUs fit a terminal, twelve fields beside each other do not.
    rows: list[list[Value]] = []
    for field, label in COLUMNS.items():
        statistics = [record.statistics.get(field) for record in records]
        if any(statistics):
            rows.append([label, *map(_spread, statistics)])
    meters = [Meter(record) for record in records]
    rows.append(["energy J", *(_joules(meter.energy_in(meter.whole())) for meter in meters)])
    labels = {"p50_ms": "interval p50 ms", "p99_ms": "interval p99 ms", "largest_gap_ms": "largest gap ms"}
    for name, label in labels.items():
        values = [record.sampling.get(name) for record in records]
        rows.append([label, *(None if value is None else f"{value:.1f}" for value in values)])
    header = ["", *(record.id for record in records)]
    return Table(title="mean (min - max) over the whole record", header=header, rows=rows, missing="-")


def _spread(statistics: dict[str, float | None] | None) -> str | None:
    if not statistics:
        return None
    shown = "-" if statistics["avg"] is None else f"{statistics['avg']:.0f}"
    return f"{shown} ({statistics['min']:.0f} - {statistics['max']:.0f})"


def _joules(used: EnergyWindow) -> str | None:
    if used.energy_j is None or not used.duration_s:
        return "stands still" if used.counter_still_s else None
    return f"{used.energy_j:.0f} in {used.duration_s:.1f} s"


def live_table(latest: Sequence[DeviceRecord]) -> Table:
    """A column per device, of its last sample."""
    rows: list[list[Value]] = []
    samples = [record.samples[-1] for record in latest]
    for field, label in COLUMNS.items():
        values = [getattr(sample, field) for sample in samples]
        if any(value is not None for value in values):
            rows.append([label, *(None if value is None else f"{value:.0f}" for value in values)])
    if any(sample.throttle for sample in samples):
        rows.append(["throttle", *(" ".join(sample.throttle or []) for sample in samples)])
    header = ["", *(" ".join(filter(None, (record.role, record.id))) for record in latest)]
    return Table(
        title="last sample of each device", header=header, rows=rows, note="" if rows else "none yet", missing="-"
    )
