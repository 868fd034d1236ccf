"""Every figure that is one thing over another in some windows: rates, joules per token, goodput."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What some windows held. None: not measured (energy, tokens; requests of one batch that decodes, which ends after its window), no SLO
    (good requests), no GPU (device seconds)."""

    window_s: float
    device_s: float | None
    output_tokens: int | None
    requests: int | None
    good_requests: int | None
    energy_j: float | None

    def ratio(self, name: str) -> float | None:
        """One of `RATIOS`; None where a part of it is unknown or there is nothing to divide by."""
        above, below = RATIOS[name]
        return per(getattr(self, above), getattr(self, below))


RATIOS = {
    "requests_per_s": ("requests", "window_s"),
    "output_tokens_per_s": ("output_tokens", "window_s"),
    "output_tokens_per_s_per_device": ("output_tokens", "device_s"),
    "goodput_requests_per_s": ("good_requests", "window_s"),
    "mean_power_w": ("energy_j", "window_s"),
    "j_per_output_token": ("energy_j", "output_tokens"),
    "j_per_request": ("energy_j", "requests"),
    "output_tokens_per_j": ("output_tokens", "energy_j"),
    "goodput_requests_per_s_per_device": ("good_requests", "device_s"),
    "j_per_good_request": ("energy_j", "good_requests"),
    "goodput_per_w": ("good_requests", "energy_j"),  # good requests per second over mean watts
}
"""Every figure that a window has once: what is divided by what."""


def per(top: float | None, bottom: float | None) -> float | None:
    """A ratio; None when either is not known or there is nothing to divide by."""
    return None if top is None or bottom is None or not bottom > 0 else float(top / bottom)
