"""Pairs: whose turn it is, on which servers, and how a run goes on."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment, turns
from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.load.clients import LoadResult
from pdbench.records import Clock, Flag, Gate, Run, load_run, save_run
from pdbench.report import commands
from pdbench.serving.deployment import Deployment, DeploymentInfo
from tests.support import sites
from tests.support.processes import call_pdbench
from tests.support.runs import build_run
from tests.support.sites import JOINED, KINDS, ONE, FakeDeployment, FakeSite, gates_fixture, measured, run_pairs

__all__ = ["gates_fixture"]


def starts(runs: dict[Path, Run]) -> dict[str, list[int | None]]:
    return {run.name: [trial.start for trial in run.trials] for run in runs.values()}


def indexed(out: Path, site_trials: Sequence[int]) -> FakeSite:
    """A site whose n-th load is of the n-th pair in `site_trials`."""
    return FakeSite(lambda number: measured(site_trials[number - 1]))


PAIRS_IN_ORDER = [0, 0, 1, 1, 2, 2, 3, 3]


def test_run_says_how_many_gpus_it_used_where_their_power_is_not_measured(tmp_path: Path, gates: list[Gate]) -> None:
    class OnGpus(FakeDeployment):
        def info(self) -> DeploymentInfo:
            info = super().info()
            for index, server in enumerate(info.instances()):
                server.gpus = [index]
            return info

    class GpuSite(FakeSite):
        def deployment(self, kind: DeploymentKind, config: ServeConfig) -> Deployment:
            return OnGpus(kind, config)

    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, GpuSite(measured), runs, ONE)
    assert [analyze(run).gpus for run in runs.values()] == [1, 2]


def test_every_turn_has_its_own_server_start(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    printed = run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs)
    assert starts(runs) == {"single": [0, 3, 4], "disaggregated": [1, 2, 5]}  # A B B A A B
    assert "3 pairs of single, disaggregated, 6 server starts" in printed
    assert printed.count("correctness gate") == 3


def test_joined_turns_share_a_start(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    printed = run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs, JOINED)
    assert starts(runs) == {"single": [0, 2, 2], "disaggregated": [1, 1, 3]}  # A BB AA B
    assert "4 server starts" in printed


def test_resident_deployments_start_once_with_ports_logs_and_memory_of_their_own(
    tmp_path: Path, gates: list[Gate]
) -> None:
    runs: dict[Path, Run] = {}
    site = indexed(tmp_path, PAIRS_IN_ORDER)
    printed = run_pairs(tmp_path, site, runs, PairConfig(pairs=4, resident=True))
    assert starts(runs) == {"single": [0] * 4, "disaggregated": [0] * 4}
    assert printed.count("correctness gate") == 1 and "on servers that stay up" in printed
    single, disaggregated = (config for _, config in site.planned[-2:])
    assert single.log_dir != disaggregated.log_dir
    assert single.gpu_memory_utilization == disaggregated.gpu_memory_utilization == 0.4
    ports = [
        {getattr(config, f"{name}_port") for name in ("single", "prefill", "decode", "proxy", "kv")}
        for config in (single, disaggregated)
    ]
    assert not ports[0] & ports[1]


def test_servers_that_stay_serve_the_next_run_until_other_ones_are_needed(tmp_path: Path, gates: list[Gate]) -> None:
    site, printed = FakeSite(measured), io.StringIO()
    console = Console(file=printed, width=200)
    servers = turns.Servers(site, console, stay=True)
    runs: dict[Path, Run] = {}
    larger = replace(sites.OPTIONS, serve=ServeConfig(prefill_instances=2))
    for number, (kind, options) in enumerate(
        [(KINDS[0], sites.OPTIONS)] * 2 + [(KINDS[1], sites.OPTIONS)] * 2 + [(KINDS[1], larger)]
    ):
        experiment.run((kind,), ONE, options, tmp_path / str(number), console, site, runs, servers=servers)
    assert [trial.start for run in runs.values() for trial in run.trials] == [0, 0, 1, 1, 2]
    assert printed.getvalue().count("starting; logs") == 3 and printed.getvalue().count("correctness gate") == 2
    assert [run.gate is not None for run in runs.values()] == [False, False, True, True, True]
    assert len({run.clock for run in runs.values()}) == 1 and servers.up
    servers.close()
    assert not servers.up


def test_run_with_until_adds_pairs_until_they_are_enough(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}

    def enough() -> bool:
        return all(len(run.trials) == 2 for run in runs.values())

    design = PairConfig(pairs=1, resident=False, until="tbt_p99_ms<5%")
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs, design, enough)
    assert [len(run.trials) for run in runs.values()] == [2, 2]


def test_run_with_until_gives_up_after_most_pairs(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    design = PairConfig(pairs=1, resident=False, until="tbt_p99_ms<5%", most_pairs=3)
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs, design, lambda: False)
    assert [len(run.trials) for run in runs.values()] == [3, 3]


def test_resumed_run_adds_the_missing_pairs(tmp_path: Path, gates: list[Gate]) -> None:
    first: dict[Path, Run] = {}
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), first, ONE)
    second: dict[Path, Run] = {}
    printed = run_pairs(
        tmp_path, indexed(tmp_path, [1, 1, 2, 2]), second, PairConfig(pairs=3, resident=False, resume=True)
    )
    assert {run.name: [trial.index for trial in run.trials] for run in second.values()} == {
        "single": [0, 1, 2],
        "disaggregated": [0, 1, 2],
    }
    assert starts(second) == {"single": [0, 3, 4], "disaggregated": [1, 2, 5]}
    assert {run.clock.unix_s for run in [*first.values(), *second.values()]} == {
        next(iter(first.values())).clock.unix_s
    }
    assert "2 pairs" in printed and "replaces" not in printed
    printed = run_pairs(tmp_path, indexed(tmp_path, [0, 0]), {}, ONE)
    assert (
        f"replaces the earlier results in {tmp_path}/single_results, {tmp_path}/disaggregated_results (--resume "
        in printed
    )


def test_runs_of_a_command_that_was_ended_in_its_first_turn_are_pairs_when_it_is_resumed(
    tmp_path: Path, gates: list[Gate]
) -> None:
    def killed(number: int) -> LoadResult:
        if number == 2:
            raise UserError("killed")
        return measured(0)

    with pytest.raises(UserError, match="killed"):
        run_pairs(tmp_path, FakeSite(killed), {}, ONE)
    assert not (tmp_path / "disaggregated_results").exists()
    runs: dict[Path, Run] = {}
    resumed = PairConfig(pairs=2, resident=False, resume=True)
    run_pairs(tmp_path, indexed(tmp_path, [0, 1, 1]), runs, resumed)
    single, disaggregated = (load_run(tmp_path / f"{kind}_results") for kind in KINDS)
    assert single.clock == disaggregated.clock and single.config == disaggregated.config | {
        "serve": single.config["serve"]
    }
    compared = compare(*map(analyze, (single, disaggregated)))
    assert compared.design == "pairs" and compared.mismatches == []
    run_pairs(tmp_path, indexed(tmp_path, [2, 2]), {}, replace(resumed, pairs=3))


@pytest.mark.parametrize("ago_s", [3600.0, -3600.0], ids=["another boot", "clock set back"])
def test_turns_after_another_boot_come_after_those_before_it(tmp_path: Path, gates: list[Gate], ago_s: float) -> None:
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), {}, ONE)
    for kind in KINDS:
        run = load_run(tmp_path / f"{kind}_results")
        run.clock = Clock(monotonic_s=run.clock.monotonic_s + 1e6, unix_s=run.clock.unix_s - ago_s)
        save_run(run, tmp_path / f"{kind}_results")
    runs: dict[Path, Run] = {}
    resumed = PairConfig(pairs=2, resident=False, resume=True)
    if ago_s < 0:
        with pytest.raises(UserError, match="this host's clock was set back"):
            run_pairs(tmp_path, FakeSite(measured), runs, resumed)
        return
    run_pairs(tmp_path, indexed(tmp_path, [1, 1]), runs, resumed)
    (clock,) = {run.clock for run in runs.values()}
    assert 3600 <= clock.now() < 3900


@pytest.mark.parametrize(
    ("flag", "error", "words"),
    [
        (Flag("interrupted", "stopped by Ctrl-C"), KeyboardInterrupt, ""),
        (Flag("client-lost", "client 1 died"), UserError, "client 1 died"),
    ],
    ids=["interrupted", "client lost"],
)
def test_resumed_run_measures_a_turn_again_that_was_cut_short(
    tmp_path: Path, gates: list[Gate], flag: Flag, error: type[BaseException], words: str
) -> None:
    def cut_short(number: int) -> LoadResult:
        return measured(0, None, *[flag] * (number == 2))

    with pytest.raises(error, match=words):
        run_pairs(tmp_path, FakeSite(cut_short), {}, ONE)
    run_pairs(tmp_path, indexed(tmp_path, [0]), {}, PairConfig(pairs=1, resident=False, resume=True))
    disaggregated = load_run(tmp_path / "disaggregated_results")
    assert [trial.index for trial in disaggregated.trials] == [0] and disaggregated.flags == []


@pytest.mark.parametrize(
    ("trial", "left"),
    [(2, [0]), (3, [0, 1]), (1, [1])],
    ids=["during it", "before the next was one", "before another, on servers that were started again"],
)
def test_turn_in_which_a_server_died_is_measured_again(
    tmp_path: Path, gates: list[Gate], trial: int, left: list[int]
) -> None:
    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs, PairConfig(pairs=2, resident=False))
    folder = tmp_path / "single_results"
    runs[folder].flags.append(Flag("server-died", f"trial {trial}: single-0 died"))
    save_run(runs[folder], folder)
    kept = turns.saved_runs(
        {"single": folder}, {"single": sites.OPTIONS.serve}, PairConfig(resident=False), sites.OPTIONS
    )["single"]
    assert [each.index for each in kept.trials] == left
    assert {request.trial for request in kept.requests} == set(left) and kept.flags == []


def test_resumed_run_forgets_flags_whose_figures_change_with_more_trials(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs, PairConfig(pairs=2, resident=False))
    folder = tmp_path / "single_results"
    kept = Flag("client-limited", "requests left late")
    runs[folder].flags += [Flag("throttled", "gpu0: sw_power_cap in 58 % of the samples"), kept]
    save_run(runs[folder], folder)
    given = {"single": folder}, {"single": sites.OPTIONS.serve}, PairConfig(resident=False), sites.OPTIONS
    assert turns.saved_runs(*given)["single"].flags == [kept]


def test_resume_refuses_a_run_with_other_options(tmp_path: Path, gates: list[Gate]) -> None:
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), {}, ONE)
    other = Options(load=LoadConfig(requests=7), power=PowerConfig(power=False))
    with pytest.raises(UserError, match="other options"):
        experiment.run(
            KINDS, PairConfig(pairs=2, resume=True), other, tmp_path, Console(quiet=True), FakeSite(measured), {}
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run.config["serve"].update(vllm_args="--seed 7"), "other options"),
        (lambda run: run.config["pairs"].update(resident=True), "other options"),
        (lambda run: run.host.update(name="elsewhere"), "another host, other GPUs or other versions"),
        (
            lambda run: run.host.update(gpus=[{"index": 0, "name": "H", "uuid": "GPU-b"}]),
            "another host, .*GPU 0 GPU-b instead of none",
        ),
        (lambda run: run.versions.update(vllm="0.1"), "other versions .*vllm 0.1 instead of"),
    ],
    ids=["servers", "design", "host", "gpus", "version"],
)
def test_resume_refuses_trials_that_are_not_the_same(
    tmp_path: Path, gates: list[Gate], change: Callable[[Run], None], words: str
) -> None:
    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), runs, ONE)
    folder = tmp_path / "single_results"
    change(runs[folder])
    save_run(runs[folder], folder)
    with pytest.raises(UserError, match=words):
        run_pairs(tmp_path, FakeSite(measured), {}, PairConfig(pairs=2, resident=False, resume=True))


def test_resumed_run_with_until_counts_the_saved_pairs(tmp_path: Path, gates: list[Gate]) -> None:
    run_pairs(tmp_path, indexed(tmp_path, PAIRS_IN_ORDER), {}, ONE)
    runs: dict[Path, Run] = {}
    seen: list[list[int]] = []

    def enough() -> bool:
        seen.append([len(run.trials) for run in runs.values()])
        return seen[-1] == [2, 2]

    design = PairConfig(pairs=1, resident=False, resume=True, until="tbt_p99_ms<5%", most_pairs=3)
    run_pairs(tmp_path, indexed(tmp_path, [1, 1]), runs, design, enough)
    assert seen == [[1, 1], [2, 2]]


def test_no_comparison_is_never_narrow_enough() -> None:
    assert not commands.narrow_enough({}, ("tbt_p99_ms", 0.05))


def test_until_of_what_can_never_be_judged_is_an_error_after_the_first_pair(tmp_path: Path) -> None:
    runs = {tmp_path / kind: build_run(kind, trials=1, gpu=False) for kind in KINDS}
    assert not commands.narrow_enough(runs, ("tbt_p99_ms", 0.05))
    with pytest.raises(UserError, match=r"--until: j_per_output_token is not measured here; there are .*ttft_p50_ms, "):
        commands.narrow_enough(runs, ("j_per_output_token", 0.05))
    done = call_pdbench("run", "--against", "single", "--until", "tbt_p99_ms<5%", cwd=tmp_path)
    assert done.returncode == 1 and "--until compares deployments, and --against single names one" in done.stderr


def test_resident_and_joined_starts_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resident and --join-starts"):
        run_pairs(tmp_path, FakeSite(measured), {}, PairConfig(resident=True, join_starts=True))


@pytest.mark.parametrize(
    ("load", "requests"),
    [
        (LoadConfig(), turns.REQUESTS_ON_CPU),
        (LoadConfig(requests=16), 16),
        (LoadConfig(concurrency=4), None),
        (LoadConfig(rate=2.0), None),
        (LoadConfig(duration_s=30.0), None),
    ],
)
def test_turns_without_gpus_have_fewer_requests_by_default(load: LoadConfig, requests: int | None) -> None:
    assert turns.shortened(load, on_gpu=False).requests == requests
    assert turns.shortened(load, on_gpu=True) == load
