"""Which of a run's device curves are drawn, and why one is not; without matplotlib, which pages and readers do not need.

Try: python -c "from pdbench.records import load_run; from pdbench.report.curves import reasons; print(reasons(load_run('single_results'), 'power_w'))"
"""

from pdbench.analysis.energy import power_curve
from pdbench.records import DeviceRecord, Run

ROLE_ORDER = {"prefill": 0, "decode": 1}
"""The order of a request's way; all other roles come after."""


def curves_of(run: Run) -> list[DeviceRecord]:
    """The devices whose curves are drawn, in the order of the request's way: prefill, decode, others."""
    return sorted(run.devices, key=lambda device: (ROLE_ORDER.get(device.role or "", 2), device.id))


def series(device: DeviceRecord, field: str) -> tuple[list[float], list[float]]:
    """(instants, values) of a field where it was measured; power from the driver's fine buffer where there is one."""
    if field == "power_w":
        points = power_curve(device)
    else:
        points = [(s.t_s, value) for s in device.samples if (value := getattr(s, field)) is not None]
    return [t for t, _ in points], [value for _, value in points]


def reasons(run: Run, field: str) -> str:
    """Why no device has `field`."""
    said = {device.not_measured[field] for device in run.devices if field in device.not_measured}
    return "; ".join(sorted(said)) or ("no device was sampled" if not run.devices else "this machine has no such meter")
