"""What a device's samples amount to: each field's mean and range, and how evenly the samples lie.

Try: python -c "
from pdbench.power.statistics import field_statistics; from pdbench.records import DeviceSample
print(field_statistics([DeviceSample(t_s=0, power_w=100.0), DeviceSample(t_s=1, power_w=300.0)]))"
"""

import itertools
from collections.abc import Sequence

import numpy as np

from pdbench.records import DeviceSample

_NOT_STATISTICS = {"t_s", "read_s", "energy_j", "throttle"}


def field_statistics(samples: Sequence[DeviceSample]) -> dict[str, dict[str, float | None]]:
    """Field -> avg, min and max over the samples that have it; a field that no sample has is left out."""
    found: dict[str, dict[str, float | None]] = {}
    for field in (name for name in DeviceSample.__struct_fields__ if name not in _NOT_STATISTICS):
        values = [value for sample in samples if (value := getattr(sample, field)) is not None]
        if values:
            found[field] = {"avg": float(np.mean(values)), "min": float(min(values)), "max": float(max(values))}
    return found


def sampling_statistics(
    samples: Sequence[DeviceSample], fine: Sequence[tuple[float, float]]
) -> dict[str, float | None]:
    """The achieved interval (p50, p99, largest gap), the time a read takes, the fine curve's interval, repeated powers.

    A repeat is a sample whose power equals the one before it: the device had not refreshed it (or drew just the same).
    """
    gaps_ms = 1000 * np.diff([sample.t_s for sample in samples])
    reads_ms = [1000 * sample.read_s for sample in samples if sample.read_s is not None]
    fine_ms = 1000 * np.diff([t for t, _ in fine])
    powers = [sample.power_w for sample in samples]
    repeats = sum(a is not None and a == b for a, b in itertools.pairwise(powers))
    return {
        "p50_ms": float(np.percentile(gaps_ms, 50)) if len(gaps_ms) else None,
        "p99_ms": float(np.percentile(gaps_ms, 99)) if len(gaps_ms) else None,
        "largest_gap_ms": float(np.max(gaps_ms)) if len(gaps_ms) else None,
        "read_p50_ms": float(np.median(reads_ms)) if reads_ms else None,
        "fine_interval_ms": float(np.median(fine_ms)) if len(fine_ms) else None,
        "stale_repeats": float(repeats),
    }


def mean_power_w(
    samples: Sequence[DeviceSample], fine: Sequence[tuple[float, float]], start_s: float, end_s: float
) -> float | None:
    """The mean of the fine curve's points in a window of steady power, or of the samples' where there is none."""
    inside = [power for t, power in fine if start_s <= t <= end_s]
    if not inside:
        inside = [s.power_w for s in samples if s.power_w is not None and start_s <= s.t_s <= end_s]
    return float(np.mean(inside)) if inside else None
