"""`pdbench plan`: runs in, a calibration, checks and predictions out; printed, and saved with their pictures."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console

from pdbench import documents, failures
from pdbench.config import LoadConfig, Policy
from pdbench.errors import NOT_JSON, UserError
from pdbench.files import check_writable, read_whole, write_all
from pdbench.load import plan as loads
from pdbench.plan import records
from pdbench.plan.calibration import calibrate, check_suitable
from pdbench.plan.check import check
from pdbench.plan.demand import demand_of_load, with_requests
from pdbench.plan.deployment import parse_layout
from pdbench.plan.predict import UNCOUNTED_SLO, predict
from pdbench.plan.records import Calibration, Prediction
from pdbench.plan.remedy import command_for
from pdbench.plan.search import search
from pdbench.records import Run, load_run
from pdbench.report import mpl, tables, text
from pdbench.report import plan as report
from pdbench.report.plan_curves import distributions_chart, steps_chart
from pdbench.report.search_files import check_no_measured_search
from pdbench.report.text import translate as _
from pdbench.search import document
from pdbench.validation import check_other_runs

CALIBRATION = "calibration.json"
SEARCHED_S = 10.0
"""Length of a load that is searched without one: queues can grow."""


def plan(
    sources: Sequence[Path],
    checked: Sequence[Path],
    deployments: Sequence[str],
    load: LoadConfig,
    out: Path,
    console: Console,
    *,
    most_gpus: int | None = None,
    by_joules: bool = False,
    prefill_policy: Policy = "least-work",
    decode_policy: Policy = "least-work",
) -> None:
    """Calibrate by `sources`, check against other runs, predict deployments; tables go to `out`/plan.md too. With `most_gpus`, search the
    cheapest of so many GPUs that keeps the load's SLO, and predict the best of each kind.

    Raises UserError for runs that calibrate nothing, and options that contradict each other.
    """
    check_no_measured_search(out)
    check_writable(out)
    predicted: list[Prediction] = []
    wanted = [parse_layout(words) for words in deployments]
    if unknown := next((name for name in UNCOUNTED_SLO if getattr(load, name) is not None), None):
        option = "--" + unknown.replace("_", "-")
        raise UserError(f"plan counts by --slo-ttft-ms and --slo-tbt-ms, not by {option}: leave it out")
    if most_gpus is not None:
        if load.concurrency:
            raise UserError(
                "--search needs an open loop without a limit of requests in flight: leave --concurrency out"
            )
        if load.slo_ttft_ms is None and load.slo_tbt_ms is None:
            raise UserError("--search needs an SLO: give --slo-ttft-ms, --slo-tbt-ms or both")
        if not load.open_loop:
            raise UserError("--search needs a load that comes by a clock: give --rate, --stages or --trace")
    words = ""
    if load != LoadConfig() and not wanted and most_gpus is None:
        raise UserError("a load is what deployments are predicted for: give --deployment or --search, or leave it out")
    if wanted or most_gpus is not None:
        load = with_requests(load, least_s=0.0 if most_gpus is None else SEARCHED_S)
        demand_of_load(load, 0)
        named = {"--prefill-policy": prefill_policy, "--decode-policy": decode_policy}
        policies = [f"{option} {policy}" for option, policy in named.items() if policy != "least-work"]
        limits = [f"SLO {name} {limit:g} ms" for name, limit in text.slo(vars(load)).items()]
        words = ", ".join([loads.describe(loads.resolved(load)).partition(", after a warm-up")[0], *limits, *policies])
    shown: list[tables.Table] = []

    files: dict[str, bytes] = {}  # written at the end, so that no folder holds half of an answer

    def save(name: str, content: object) -> None:
        files[name] = documents.encode(content)

    def show(table: tables.Table) -> None:
        shown.append(table)
        console.print(tables.Terminal(table))

    found = read_calibration(sources, console)
    files[CALIBRATION] = documents.encode(found, seal=True)
    show(report.calibration(found))
    drawn = [partial(steps_chart, found)]
    checks = []
    for path in checked:
        try:
            checks.append(check(found, path, counting_run(path)))
        except UserError as error:
            if len(checked) == 1:
                raise
            tables.say(console, _("not checked: {0}", error))
            continue
        show(report.check(checks[-1]))
    if checked and not checks:
        raise UserError("no run is left to check: read the lines above")
    if len(checks) > 1:
        show(report.overview(checks))
    if checks:
        save("checks.json", checks)
        drawn += [partial(report.checks_chart, checks), partial(distributions_chart, checks)]
    found = msgspec.structs.replace(found, prefill_policy=prefill_policy, decode_policy=decode_policy)
    slo = load.slo_ttft_ms, load.slo_tbt_ms
    asked: Sequence[Prediction] = []
    if most_gpus is not None:
        result = search(
            found, lambda draw: demand_of_load(load, draw), words, slo=slo, most_gpus=most_gpus, by_joules=by_joules
        )
        save(document.FILE, result)
        refused = [each for each in result.candidates if each.refusal]
        show(report.search(result, on_gpus=found.on_gpus, remedy=command_for(found, refused, load)))
        drawn.append(partial(report.search_chart, result, on_gpus=found.on_gpus))
        # The best of each kind with all its figures.
        best = {each.layout.kind: each for each in reversed(result.candidates) if not each.refusal}
        predicted += [each for each in result.candidates if each in best.values()]
        asked = result.candidates
    shown_already = {each.layout.name for each in predicted}
    wanted = [layout for name, layout in {each.name: each for each in wanted}.items() if name not in shown_already]
    predicted += [
        predict(found, layout, lambda draw: [demand_of_load(load, draw)], words, slo=slo) for layout in wanted
    ]
    if predicted:
        save("predictions.json", predicted)
        refused = [each for each in predicted if each.refusal]
        show(report.predictions(predicted, on_gpus=found.on_gpus, remedy=command_for(found, refused, load)))
        drawn.append(partial(report.predictions_chart, predicted, on_gpus=found.on_gpus))
    drawn.append(partial(report.seconds_chart, checks, predicted))
    files["plan.md"] = ("\n\n".join(map(tables.markdown, shown)) + "\n").encode()
    mpl.say_when_english(console)
    for describe in drawn:
        if (chart := describe()).drawable:
            width = 17 if chart.key == "seconds" else 14  # names of its bars stand at the left
            picture = mpl.chart_picture(describe, width, lambda rows: 2.4 + 5 * rows)
            files[f"{chart.key}.png"] = picture
    write_all(out, "plan", files)
    tables.say(console, _("saved in {0}", str(out)))
    if (asked := [*asked, *predicted]) and all(each.refusal for each in asked):
        raise UserError("no deployment is predicted: the tables say why, and what would help")


def read_calibration(sources: Sequence[Path], console: Console) -> Calibration:
    """Of runs' folders, or the one saved in a folder of `pdbench plan` (where no run is). Raises UserError for what is neither."""
    of_plan = [path for path in sources if (path / CALIBRATION).is_file() and not any(path.glob("*_results.json"))]
    if of_plan and len(sources) > 1:
        raise UserError(f"{of_plan[0]} is a calibration, not a run: give it alone, or folders of runs only")
    if of_plan:
        saved = of_plan[0] / CALIBRATION
        try:
            content = read_whole(saved)
            found = msgspec.json.decode(content, type=Calibration)
        except NOT_JSON as error:
            raise UserError(f"{saved} is no calibration ({error}): calibrate by its runs again") from None
        if found.schema != records.SCHEMA:
            raise UserError(
                f"{saved} has schema {found.schema}, this pdbench reads {records.SCHEMA}: calibrate by its runs again"
            )
        if documents.is_edited(content):  # among what is missing, where every later copy keeps it
            edited = f"a calibration as measured: {saved} was edited after it was saved; calibrate by its runs again"
            return msgspec.structs.replace(found, missing=[edited, *found.missing])
        return found
    if not sources:
        raise UserError(
            "name the results folders of runs to calibrate by, as in `pdbench plan single_results disaggregated_results`"
        )
    runs = suitable_runs(sources, console) if len(sources) > 1 else {path: counting_run(path) for path in sources}
    check_other_runs((run.run_id, path) for path, run in runs.items())
    return calibrate(runs)


def suitable_runs(folders: Sequence[Path], console: Console) -> dict[Path, Run]:
    """Without the runs that plan refuses: one load at which a client did not keep up is no reason to lose the others.

    Raises UserError where none is left.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        try:
            run = counting_run(folder)
            check_suitable(folder, run)
            runs[folder] = run
        except UserError as error:
            tables.say(console, f"left out: {error}")
    if not runs:
        raise UserError("no run is left that calibrates: read the lines above")
    return runs


def counting_run(path: Path) -> Run:
    """Raises UserError for a run whose figures do not count."""
    run = load_run(path)
    if why := failures.void(run.flags, None, 0):
        raise UserError(f"{path}: {why}: leave it out, or measure it again")
    return run
