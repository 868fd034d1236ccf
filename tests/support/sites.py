"""A site on which nothing runs: what is measured is given to it. The correctness check passes or fails as given."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import correctness, experiment, trial
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, PowerConfig, ServeConfig
from pdbench.load.clients import LoadResult
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock, Flag, Gate, RequestError, RequestRecord, Run, Trial
from pdbench.serving.deployment import Deployment, DeploymentInfo, ServerHost, ServerInfo, States
from pdbench.serving.plan import ServerSpec
from pdbench.site import Measurement, Site

OPTIONS = Options(load=LoadConfig(requests=1, canaries=0.0), power=PowerConfig(power=False))
KINDS: tuple[DeploymentKind, ...] = ("single", "disaggregated")
ONE, THREE = (PairConfig(pairs=pairs, resident=False) for pairs in (1, 3))
JOINED = PairConfig(pairs=3, join_starts=True)


class FakeDeployment(Deployment):
    """Nothing runs; `start` reports states that are given to it."""

    def __init__(self, kind: DeploymentKind, config: ServeConfig, states: Sequence[States] = ()) -> None:
        super().__init__(kind, config, Site())
        self.states = states

    limit: int | None = None

    def start(self, on_states: Callable[[States], None] | None = None) -> "FakeDeployment":
        for states in self.states:
            assert on_states
            on_states(states)
        return self

    def check_ports(self) -> None:
        pass

    def check(self) -> None:
        pass

    def info(self) -> DeploymentInfo:
        url = "http://127.0.0.1:1"
        servers = [ServerInfo(name=spec.name, role=spec.role, url=url) for spec in self.specs]
        config = self.config.plain() | {"max_num_seqs": self.limit}
        return DeploymentInfo(name=self.kind, url=url, model_name="m", servers=servers, config=config)


class FakeSite(Site):
    """`load(number)` returns what the number-th trial measured."""

    def __init__(self, load: Callable[[int], LoadResult]) -> None:
        super().__init__()
        self._load = load
        self.trials = 0
        self.planned: list[tuple[DeploymentKind, ServeConfig]] = []

    @contextmanager
    def reserve(self, specs: Sequence[ServerSpec]) -> Iterator[dict[str, ServerHost]]:
        yield {}

    def deployment(self, kind: DeploymentKind, config: ServeConfig) -> Deployment:
        self.planned.append((kind, config))
        return FakeDeployment(kind, config)

    def measurement(self, info: DeploymentInfo, power: PowerConfig, clock: Clock) -> Measurement:
        return Measurement([], power, clock)

    def run_load(
        self,
        load: TrialLoad,
        on_progress: Callable[..., None],
        on_begin: Callable[[], object],
        problem: Callable[[], str | None],
    ) -> LoadResult:
        self.trials += 1
        result = self._load(self.trials)
        result.trial.index = load.trial
        for request in result.requests:
            request.trial = load.trial
        return result


def measured(number: int, error: RequestError | None = None, *flags: Flag) -> LoadResult:
    request = RequestRecord(id=f"r{number}", planned_s=0.0, error=error)
    return LoadResult([request], Trial(index=number, start_s=number, end_s=number + 1.0), list(flags))


def gate(passed: bool = True) -> Gate:
    return Gate(
        passed=passed, prompts=4, equal_outputs=4, prompt_tokens=80, external_kv_tokens=80, detail="as it was given"
    )


@pytest.fixture(name="gates")
def gates_fixture(monkeypatch: pytest.MonkeyPatch) -> list[Gate]:
    """The verdicts of the correctness check, one per start of prefill and decode; it passes when they are used up. Requests of these
    sites have no tokens, and after failed ones a death is waited for: not for long."""
    verdicts: list[Gate] = []

    def run(info: DeploymentInfo, nonce: int, reference: list[str] | None) -> tuple[Gate, list[str]]:
        return (verdicts.pop(0) if verdicts and info.name == "disaggregated" else gate()), ["text"]

    monkeypatch.setattr(correctness, "run", run)
    monkeypatch.setattr(trial, "DEATH_S", 0.25)
    return verdicts


def run_pairs(
    out: Path,
    site: FakeSite,
    runs: dict[Path, Run],
    design: PairConfig = THREE,
    enough: Callable[[], bool] | None = None,
) -> str:
    """What `experiment.run` printed."""
    printed = io.StringIO()
    experiment.run(KINDS, design, OPTIONS, out, Console(file=printed, width=200), site, runs, enough)
    return printed.getvalue()
