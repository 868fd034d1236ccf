"""What calibration and prediction are saved as: versioned JSON. Unknown is None. Seconds, watts and joules as named."""

from typing import Literal

import msgspec

from pdbench.plan.engine import Deployment, Engine, Role

SCHEMA = "pdbench-plan/1"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A run that a calibration was made from. `gpu` is the model name, `vllm` the version; `trials` those that were used."""

    run_id: str | None
    path: str
    kind: str
    model: str
    gpu: str | None
    vllm: str | None
    trials: int
    requests: int


class PowerCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Watts of one instance, fitted over windows of 1 s (`windows` of them, `residual_w` their root mean square error):

    P = idle_w + (decode_w - idle_w) * decode share + sequence_w * sequences + prefill_w * prefill share + prompt_token_j * tokens/s
    """

    idle_w: float
    decode_w: float
    sequence_w: float
    prefill_w: float
    prompt_token_j: float
    windows: int
    residual_w: float


class RoleCalibration(msgspec.Struct, frozen=True, kw_only=True):
    """One role's engine as fitted. `errors` are standard errors of the logarithms of the costs that replay fitted (infinite:
    not identified), `covariance` is theirs, rows in the order of `errors`. `speeds` are the trials' factors on prefill's costs,
    `noise` the trials' series of residual factors of prefill steps. `assumed` says what was not recorded and what was taken for it."""

    engine: Engine
    errors: dict[str, float]
    covariance: list[list[float]]
    speeds: list[float]
    noise: list[tuple[float, ...]]
    assumed: list[str] = []
    power: PowerCosts | None = None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a prediction needs, from one or several runs. `drift` is the largest ratio of two trials' speeds; `missing`
    says what was not measured and the command that measures it."""

    schema: str = SCHEMA
    sources: list[Source]
    roles: dict[Role, RoleCalibration]
    handoff_s: float | None = None
    handoff_per_token_s: float = 0.0
    proxy_s: float = 0.0
    first_token: Literal["prefill", "decode"] = "prefill"
    prefill_opens: float = 1.0
    drift: float = 1.0
    missing: list[str] = []


class Figure(msgspec.Struct, frozen=True):
    """A predicted figure with the bounds of its 90 % interval; None: no interval (too few trials)."""

    value: float
    low: float | None = None
    high: float | None = None


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment does under a load. `figures` are named as metrics of a run (ttft_p50_ms, j_per_output_token, ...).

    `outside` is the share of the busy time in steps beyond the calibrated box, by what was beyond. `refusal`: why the figures must
    not be used, and the measurement that is missing; then `figures` is empty.
    """

    schema: str = SCHEMA
    deployment: Deployment
    load: str
    figures: dict[str, Figure] = {}
    outside: dict[str, float] = {}
    refusal: str | None = None
    simulated_s: float = 0.0
