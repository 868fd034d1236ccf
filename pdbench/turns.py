"""How deployments take turns: in pairs, each turn on servers of its own, or on servers that stay up."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast, get_args

import msgspec
from rich.console import Console
from rich.markup import escape

from pdbench import documents, failures, identity, sweep
from pdbench.analysis.flags import DERIVED
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, ServeConfig
from pdbench.errors import OptionError, UserError, span
from pdbench.live import publisher, terminal
from pdbench.load import plan
from pdbench.load.contents import contents_of
from pdbench.power.idle import ENGINE_READY, Idle
from pdbench.records import Clock, Flag, Gate, RequestRecord, Run, load_run
from pdbench.serving import machine as machines
from pdbench.serving.deployment import Deployment, States
from pdbench.site import Site

PAIRS, REQUESTS_ON_CPU = 3, 8
"""By default: three pairs fit into a quarter of an hour on two GPUs and, with fewer requests per turn, into five minutes with set-up without."""
PORTS_APART = 20
"""Between the first ports of two deployments that run side by side."""
START_S = {True: 100.0, False: 30.0}
"""A start on a GPU (DeepSeek-V2-Lite's shape with CUDA graphs on an H100: 95 to 125 s) and on a CPU (the tiny model), for estimates."""
TOKEN_S = {"cpu": 0.014, "eager": 0.05, "graphs": 0.006}
"""Seconds per token of one stream, of those models, for estimates."""
TURN_S = 8.0
"""Warm-up, idle power and waiting of a turn, for estimates."""


def deployments(text: str) -> list[DeploymentKind]:
    """Names with commas between. Raises UserError for one that does not exist."""
    names: list[DeploymentKind] = []
    for part in text.split(","):
        if part not in get_args(DeploymentKind):
            raise OptionError(f"no deployment {part!r}: choose from {', '.join(get_args(DeploymentKind))}")
        names.append(cast(DeploymentKind, part))
    return names


def order(kinds: Sequence[DeploymentKind], pair: int) -> Sequence[DeploymentKind]:
    """A B | B A | A B, so that a steady drift cancels."""
    return kinds if pair % 2 == 0 else kinds[::-1]


@contextmanager
def started(deployment: Deployment, console: Console) -> Iterator[Deployment]:
    """The deployment up and healthy, one line per server; down at the end."""
    names = [spec.name for spec in deployment.specs]
    logs = escape(f"{deployment.config.log_dir}/")
    console.print(f"[bold]{deployment.kind}[/bold]: {', '.join(names)} starting; logs in {logs}")
    if shared := deployment.sharing():
        console.print(f"  {shared}", soft_wrap=True)
    publisher.stage("{0}: {1} starting", deployment.kind, ", ".join(names))
    ready: dict[str, int | None] = {}
    printed_s = time.monotonic()
    with console.status("starting") as status:

        def on_states(states: States) -> None:
            nonlocal printed_s
            starting: dict[str, list[str]] = {}
            for server in deployment.info().servers:
                name, state = server.name, states.get(server.name)
                if state and not state.healthy:
                    words = f"starting{f' on {server.host}' if server.host else ''}, {state.age_s:.0f} s"
                    starting.setdefault(words, []).append(name)
                elif state and ready.get(name) != state.pid:
                    word = "ready again" if name in ready else "ready"
                    ready[name] = state.pid
                    console.print(f"  {name}: {word} after {state.age_s:.0f} s at {server.url}", markup=False)
                    publisher.stage("{0}: ready after {1} s", name, f"{state.age_s:.0f}")
                    printed_s = time.monotonic()
            line = " · ".join(f"{', '.join(names)} {words}" for words, names in starting.items())
            status.update(escape(line) or "ready")
            if line and not console.is_terminal and time.monotonic() - printed_s >= terminal.LINE_EVERY_S:
                # A file or a pipe shows no status line: without this it would be silent for minutes.
                console.print(f"  {line}", markup=False)
                printed_s = time.monotonic()

        with closing(deployment):
            deployment.start(on_states)
            status.stop()
            yield deployment


class Servers:
    """The servers that are up: those of the deployment whose turn it is or, resident, of all.

    With `stay` they stay up from one `experiment.run` to the next, for as long as the next needs the same. `starts` is the number of
    the last start, `flags` what was found before the first, `idle` what the GPUs drew without load (device's label -> kind -> watts), `gates` the last start's check by deployment,
    `reference` the answers that it is judged by; all runs on these servers have one `clock`.
    """

    def __init__(self, site: Site, console: Console, *, stay: bool = False) -> None:
        self._site, self._console = site, console
        self._up = ExitStack()
        self._running: dict[DeploymentKind, tuple[ServeConfig, Deployment]] = {}
        self._unused: set[DeploymentKind] = set()
        self.stay, self.starts, self.clock = stay, -1, Clock.start()
        self.flags: list[Flag] = []
        self.idle: dict[str, Idle] = {}
        self.gates: dict[DeploymentKind, Gate] = {}
        self.reference: list[RequestRecord] | None = None
        self._served: ServeConfig | None = None

    @property
    def up(self) -> bool:
        return bool(self._running)

    def serve(self, config: ServeConfig) -> None:
        """What all deployments are made of from now on; outputs of another model are no reference."""
        if config != self._served:
            self._served, self.reference = config, None

    def are_up(self, serve: Mapping[DeploymentKind, ServeConfig]) -> bool:
        """Do these deployments run, as they are to be served, with every server alive?"""
        running = ((self._running.get(kind), config) for kind, config in serve.items())
        return all(up and up[0] == config and not up[1].death() for up, config in running)

    def take(
        self, kind: DeploymentKind, serve: Mapping[DeploymentKind, ServeConfig], design: PairConfig
    ) -> tuple[Deployment, bool]:
        """The deployment, healthy, and whether nothing was measured on its servers yet."""
        wanted = serve if design.resident else {kind: serve[kind]}
        if not ((self.stay or design.resident or design.join_starts) and self.are_up(wanted)):
            self.close()
            deployments = {each: self._site.deployment(each, config) for each, config in wanted.items()}
            commands = [command for each in deployments.values() for command in each.commands.values() or [None]]
            if all(command is not None and not command.gpus for command in commands):  # on this host, all planned
                # They use the same cores, which one start after the other leaves idle; on GPUs each measures what memory is left.
                for deployment in deployments.values():
                    self._up.enter_context(closing(deployment)).begin()
            for each, deployment in deployments.items():
                self._up.enter_context(started(deployment, self._console))
                self._running[each] = wanted[each], deployment
            self._unused = set(self._running)
            self.starts += 1
        fresh = kind in self._unused
        self._unused.discard(kind)
        return self._running[kind][1], fresh

    def close(self) -> None:
        self._running.clear()
        self.gates.clear()
        for idle in self.idle.values():
            for of_kind in idle:
                of_kind.pop(ENGINE_READY, None)
        self._up.close()


def side_by_side(kinds: Sequence[DeploymentKind], serve: ServeConfig) -> dict[DeploymentKind, ServeConfig]:
    """Deployments that run at the same time: ports and logs of their own, an equal share of the GPUs' memory."""
    ports = ("single_port", "prefill_port", "decode_port", "proxy_port", "kv_port")
    return {
        kind: replace(
            serve,
            log_dir=f"{serve.log_dir}/{kind}",
            gpu_memory_utilization=serve.gpu_memory_utilization / len(kinds),
            **{name: getattr(serve, name) + PORTS_APART * place for name in ports},
        )
        for place, kind in enumerate(kinds)
    }


def resolve(design: PairConfig, *, on_gpu: bool) -> PairConfig:
    """With what was left open decided. Raises UserError for options that contradict each other."""
    if design.resident and design.join_starts:
        raise UserError("--resident and --join-starts are two ways to save server starts: give one")
    resident = design.resident if design.resident is not None else not on_gpu and not design.join_starts
    pairs = design.pairs or PAIRS
    return replace(design, resident=resident, pairs=pairs, most_pairs=max(pairs, design.most_pairs))


def shortened(load: LoadConfig, *, on_gpu: bool) -> LoadConfig:
    """Without GPUs with fewer requests by default, where they go one at a time."""
    if on_gpu or load.requests or plan.request_limit(load) is None or plan.streams(load) != 1:
        return load
    return replace(load, requests=REQUESTS_ON_CPU)


def announce(
    kinds: Sequence[DeploymentKind],
    design: PairConfig,
    options: Options,
    left: int,
    waves: Mapping[DeploymentKind, int],
    *,
    on_gpu: bool,
) -> str:
    """What will be done, and about how long it takes; a deployment starts in so many `waves` (1 unless named), one after the other."""
    load, starts = options.load, 1 if design.resident else left
    if design.join_starts:  # A BB AA B
        starts = left - left // len(kinds) + 1
    how = "on servers that stay up" if design.resident else f"{starts} server start{'' if starts == 1 else 's'}"
    pairs = left // len(kinds)
    text = f"{pairs} {'pair' if len(kinds) > 1 else 'turn'}{'' if pairs == 1 else 's'} of {', '.join(kinds)}, {how}"
    if design.until:
        text += f", up to {design.most_pairs} until {design.until}"
    turn_s = load.duration_s
    if turn_s is None and load.requests:
        token_s = TOKEN_S["cpu" if not on_gpu else "eager" if options.serve.enforce_eager else "graphs"]
        turn_s = load.requests / (load.rate or (load.concurrency or 1) / (load.output_tokens * token_s))
    if turn_s is None:
        return text
    start_s = START_S[on_gpu] * sum(waves.get(kind, 1) for kind in kinds) / len(kinds)
    seconds = (len(kinds) if design.resident else starts) * start_s + left * (turn_s + TURN_S)
    return f"{text}: about {span(round(seconds))}"


def saved_load(run: Run) -> LoadConfig:
    """What was sent, with its nonce."""
    return msgspec.convert(run.config["load"], LoadConfig)


def saved_runs(
    folders: Mapping[DeploymentKind, Path],
    serve: Mapping[DeploymentKind, ServeConfig],
    design: PairConfig,
    options: Options,
) -> dict[DeploymentKind, Run]:
    """The runs to go on with. Turns that Ctrl-C or a death cut short are left out, to be measured again.

    Raises UserError for those of another command, input file, host or version, or other GPUs: their trials would be taken for the same.
    """
    runs: dict[DeploymentKind, Run] = {}
    for kind, folder in folders.items():
        if not any(folder.glob("*_results.json")):
            continue
        run = load_run(folder)
        nonce = options.load.nonce or saved_load(run).nonce  # drawn when the run began
        load = plan.resolved(replace(options.load, nonce=nonce))
        power, served, pairs = (
            documents.as_read_back(value) for value in (asdict(options.power), serve[kind].plain(), asdict(design))
        )
        saved = {name: run.config.get(name) or {} for name in ("power", "serve", "pairs")}
        same = run.name == kind and saved_load(run) == load and saved["power"] == power
        same = same and all(saved["serve"].get(name) == value for name, value in served.items())
        same = same and all(saved["pairs"].get(name) == pairs[name] for name in ("resident", "join_starts"))
        if not same:
            raise UserError(
                f"--resume: {folder} holds a run with other options: repeat its command, or give another --out"
            )
        contents = {"contents": contents_of(options.load)}
        if other := identity.changed({"contents": run.config.get("contents")}, contents):
            raise UserError(f"--resume: {folder} {other}, or give another --out")
        was = machines.identity(run.host, run.versions)
        if differs := sweep.differences(was, machines.own_identity(run.host)):
            raise UserError(
                f"--resume: {folder} holds a run of another host, other GPUs or other versions ({differs}): give another --out"
            )
        cut = [flag for flag in run.flags if flag.name in (failures.INTERRUPTED, *failures.CUT_SHORT)]
        left_out = failures.cut_short(run)
        run.trials = [trial for trial in run.trials if trial.index not in left_out]
        run.requests = [request for request in run.requests if request.trial not in left_out]
        run.flags = [flag for flag in run.flags if flag not in cut and flag.name not in DERIVED]
        runs[kind] = run
    if len({run.clock for run in runs.values()}) > 1:
        raise UserError("--resume: the runs there are of different commands: give another --out")
    for run in runs.values():
        last_s = max((trial.end_s for trial in run.trials), default=0.0)
        if (now := run.clock.resumed()) != run.clock and last_s > now.now():
            raise UserError(
                "--resume: this host's clock was set back since, and new turns would lie among those that are saved: set it, or give another --out"
            )
    return runs
