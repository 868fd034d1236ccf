"""The command that measures what `pdbench plan` needs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pdbench.cli.app import DEFAULTS, MEASURING, Recipe, app, console
from pdbench.cli.measure import kept, progress_to, servers_stay
from pdbench.config import ClusterConfig, DeploymentKind, LiveConfig, LoadConfig, Options, PairConfig
from pdbench.config.types import Count, Positive
from pdbench.errors import UserError

if TYPE_CHECKING:
    from pdbench.analysis.run_analysis import RunAnalysis


@app.command(group_parameters=MEASURING)
def calibrate(
    recipe: Recipe = None,
    /,
    *,
    against: str = "single,disaggregated",
    trials: Count[int] = 5,
    max_minutes: Positive[float] = 30.0,
    out: Path = Path("calibration"),
    options: Options = DEFAULTS,
    cluster: ClusterConfig | None = None,
    live: LiveConfig | None = None,
) -> None:
    """Measure what `pdbench plan` is calibrated by, and say what that shows; the same command again resumes it.

    Each deployment's servers start once and get lengths that differ: at full speed, a burst of prompts, and ramps of the rate.

    Parameters
    ----------
    against
        Deployments to measure, with commas between: single, replicas, disaggregated.
    trials
        Ramps of each deployment: they tell how the machine's speed varies.
    max_minutes
        Time for the whole command: ramps are shortened to fit, and loads end when it is up.
    out
        Folder of the runs and of the calibration; `pdbench plan OUT` reads it.
    """
    from pdbench import calibrating, experiment, planning, turns
    from pdbench.report import commands

    kinds, limit_s, progress = turns.deployments(against), 60 * max_minutes, progress_to(live)
    options = replace(options, load=calibrating.spread(options.load, options.serve.max_model_len))
    analyses: list[RunAnalysis] = []
    with servers_stay(cluster, out, live, lambda: calibrating.saved(out)) as (site, servers):

        def measure(kind: DeploymentKind, options: Options, folder: Path, deadline: calibrating.Deadline) -> Path:
            with kept(lambda run, path: analyses.append(commands.keep(run, path))) as runs:
                design = PairConfig(pairs=1, resident=False)
                experiment.run([kind], design, options, folder, progress, site, runs, servers=servers, judge=deadline)
            return next(iter(runs))

        plan = calibrating.schedule(kinds, trials, options.load.ramp_s, limit_s, on_gpu=site.on_gpu)
        found, gaps = calibrating.run(kinds, options, plan, limit_s, out, measure, progress)
    if found:
        planning.plan(found, (), (), LoadConfig(), out, console)
    if gaps:
        raise UserError(f"not measured, the same command tries again: {'; '.join(gaps)}")
    commands.exit_on_flags(analyses)
