"""The command that measures what predictions were refused for."""

import math
import shlex
from collections.abc import Sequence

import numpy as np

from pdbench.config import LoadConfig
from pdbench.load.arrivals import read_stages
from pdbench.plan.calibration import SENT
from pdbench.plan.demand import demand_of_load
from pdbench.plan.engine import Kind
from pdbench.plan.records import Calibration, Prediction

BEYOND, BEGINNING = 1.25, 0.1
"""A ramp ends above the rate to be predicted, so that it stays a while in steps as large, and begins at a share of its end."""
MODEL_LEN = 1024
"""Model lengths are rounded up to a multiple of this."""
FULL_STREAMS = 32
"""So many requests at a time are the full load of `pdbench calibrate`."""
PREFILLS = "--prefill-instances="


def command_for(calibration: Calibration, refused: Sequence[Prediction], load: LoadConfig) -> str | None:
    """`pdbench calibrate` as the runs were served, with this load's lengths and a ramp up to what one instance of the refused deployments gets of
    it, with as many prefill instances as that takes, of the kinds of deployments among them. None where no measurement helps, of queues that grow (a ramp's would, too), of more requests at a time than its full load has, and of runs that do not say how they were served."""
    layouts = [each.layout for each in refused if each.measurable and not each.saturated]
    if not layouts or not calibration.command or (not load.open_loop and (load.concurrency or 1) > FULL_STREAMS):
        return None
    demand = demand_of_load(load, 0)
    lengths = {name: getattr(load, name) for name in SENT}
    if load.trace:
        means = {"input_tokens": demand.prompt_tokens.mean(), "output_tokens": demand.output_tokens.mean()}
        lengths |= {name: max(1, round(float(mean))) for name, mean in means.items()}
    # `calibrate` leaves outputs eight times their mean, or a third of the length, beside the longest prompt; long ones need more to have a spread.
    longest, mean = int(demand.prompt_tokens.max()), lengths["output_tokens"] or 1
    needed = longest + min(8 * mean, max(longest // 2, 2 * mean)) + 16
    needed = max(needed, int(np.max(demand.prompt_tokens + demand.output_tokens)))
    model_len = "--max-model-len="
    words = []
    for word in shlex.split(calibration.command):
        if word.startswith(model_len):
            most = max(int(word.removeprefix(model_len)), -(-needed // MODEL_LEN) * MODEL_LEN)
            words.append(f"{model_len}{most}")
            if most // 3 < 2 * mean:
                lengths["max_output_tokens"] = lengths["max_output_tokens"] or 2 * mean
        elif words[-1:] == ["--against"]:
            words.append(_against(word, {layout.kind for layout in layouts}))
        elif not word.startswith(tuple(map(_option, SENT))):
            words.append(word)
    words += [f"{_option(name)}{value}" for name, value in lengths.items() if value is not None]
    stages = read_stages(load.stages) if load.stages else []
    rate = max(load.rate or 0.0, load.ramp_to or 0.0, *(stage[0] for stage in stages))
    if load.trace and demand.t_s[-1] > 0:
        rate = len(demand) / float(demand.t_s[-1])
    if rate:
        # The role of which there are fewer gets most of the load; replicas that calibrate share theirs by two.
        replicas = 2 if "replicas" in calibration.command else 1
        shares = [
            min(layout.instances.values()) / (1 if layout.kind == "disaggregated" else replicas) for layout in layouts
        ]
        end = BEYOND * rate / min(shares)
        prefill = calibration.roles.get("prefill")
        if prefill and any(layout.kind == "disaggregated" for layout in layouts):
            # Where prompts end the ramp first, decode never gets its rate.
            needed = math.ceil(end * float(prefill.engine.costs.gpu_prompt_s(demand.prompt_tokens).mean()))
            words = [word for word in words if not word.startswith(PREFILLS)] if needed > 1 else words
            words += [f"{PREFILLS}{needed}"] if needed > 1 else []
        words += [f"--rate={BEGINNING * end:.3g}", f"--ramp-to={end:.3g}"]
    return shlex.join(words)


def _against(given: str, kinds: set[Kind]) -> str:
    """Of the deployments that were calibrated those that show the engines of `kinds`: a single instance's are replicas', too."""
    apart, together = "disaggregated" in kinds, bool(kinds - {"disaggregated"})
    return ",".join(kind for kind in given.split(",") if (apart if kind == "disaggregated" else together)) or given


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}="
