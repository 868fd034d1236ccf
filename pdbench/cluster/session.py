"""The head's side of a Ray cluster: nodes, agents, and the pulse that renews leases, gathers messages and notices who is gone.

Try: ray start --head --num-cpus 2 && pdbench doctor --cluster auto
"""

import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pdbench.cluster import clocks
from pdbench.cluster.actors import Leased, NodeAgent
from pdbench.cluster.placement import Node, find_node
from pdbench.config import ClusterConfig
from pdbench.errors import UserError
from pdbench.serving.process import GRACE_S

PULSE_S = 1.0
CLOCK_EVERY_S = 1.0
ASK_S = 300.0
"""How long a living actor may take to answer a question, or to its first word: a node may start dozens of Ray workers at once."""
_LEASE_BEYOND_S = 10.0


class LostError(Exception):
    """A node or an actor is gone; the message says which."""


class Pulsed:
    """An actor under the pulse: when it was heard last, its last state, its confirmed messages."""

    def __init__(self, name: str, node: Node, handle: Any, every_s: float) -> None:
        self.name, self.node, self.handle, self.every_s = name, node, handle, every_s
        self.heard_s = time.monotonic()
        self.heard = False
        self.state: Any = None
        self.messages: list[Any] = []
        self.lost: str | None = None
        self._confirmed = 0
        self._asked_s = 0.0
        self.pending: Any = None

    def ask_if_due(self, now_s: float) -> None:
        """Send the next pulse, one at a time."""
        if self.pending is None and self.lost is None and now_s - self._asked_s >= self.every_s:
            self._asked_s = now_s
            self.pending = self.handle.pulse.remote(self._confirmed)

    def hurry(self) -> None:
        """Send the next pulse at once."""
        self._asked_s = 0.0

    def answered(self, answer: tuple[Any, list[tuple[int, Any]]]) -> None:
        """Take an answer; a message that came before is not taken twice."""
        self.state, messages = answer
        self.heard_s, self.heard, self.pending = time.monotonic(), True, None
        for number, message in messages:
            if number > self._confirmed:
                self._confirmed = number
                self.messages.append(message)


class Cluster:
    """A connection to a running Ray cluster; a context manager that ends every actor it started, and waits for that."""

    def __init__(self, config: ClusterConfig) -> None:
        """Connect. Raises UserError when there is no cluster, or Ray is not installed."""
        try:
            import ray
        except ImportError:
            raise UserError("--cluster needs Ray: pip install 'pdbench[ray]' on every node") from None
        self.config, self.ray = config, ray
        if (config.cluster or "").startswith("ray://"):
            raise UserError(
                "--cluster ray://... is Ray's client: run pdbench on a node of the cluster, with --cluster auto"
            )
        # Ray ends a process that has lost the head for a minute; what was measured must be saved before that.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "180")
        try:
            ray.init(address=config.cluster, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"no Ray cluster at {config.cluster} ({first}): `ray start --head` on one node, "
                "`ray start --address HEAD:6379` on the others, then --cluster auto on any of them"
            ) from None
        self.nodes = [
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                name=node["NodeManagerHostname"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        own = ray.get_runtime_context().get_node_id()
        self.head = next(node for node in self.nodes if node.id == own)
        self.on_gpu = any(node.gpus for node in self.nodes)
        self.clocks: dict[str, clocks.NodeClock] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.agent_class: type[NodeAgent] = NodeAgent
        self.clients: list[Pulsed] = []
        self._pulsed: list[Pulsed] = []
        self._agents: dict[str, Pulsed] = {}
        self._clock_asked_s: dict[str, float] = {}
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._beat, name="pdbench-pulse", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(list(self._pulsed))
        self._stop.set()
        self._thread.join(5.0)
        # Leaving takes long when the head cannot be reached any more; the process's end does the same.
        leaving = threading.Thread(target=self.ray.shutdown, daemon=True)
        leaving.start()
        leaving.join(10.0)

    def node(self, word: str) -> Node:
        """The node of this address or host name. Raises UserError."""
        return find_node(self.nodes, word)

    def actor(self, kind: type[Leased], name: str, node: Node, every_s: float = PULSE_S, **options: Any) -> Pulsed:
        """A new actor of `kind` on `node`, under the pulse; `options` are Ray's (by itself it takes no resources)."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options.setdefault("num_cpus", 0)
        options.setdefault("max_concurrency", kind.threads)
        options.setdefault("scheduling_strategy", NodeAffinitySchedulingStrategy(node.id, soft=False))
        handle = self.ray.remote(kind).options(**options).remote(self.config.node_timeout_s + _LEASE_BEYOND_S)
        pulsed = Pulsed(name, node, handle, every_s)
        self._pulsed.append(pulsed)
        return pulsed

    def agents(self, wanted: Sequence[Node]) -> dict[str, Pulsed]:
        """Node address -> its agent, for these nodes; all are started at once, their clocks compared first."""
        missing = [node for node in dict.fromkeys(wanted) if node.address not in self._agents]
        for node in missing:
            self._agents[node.address] = self.actor(self.agent_class, f"agent on {node.address}", node)
        asked = {node.address: self._agents[node.address].handle.facts.remote() for node in missing}
        for node in missing:
            try:
                facts = self.ask(asked[node.address], self._agents[node.address])
            except LostError as error:
                raise UserError(f"{error}: look at that node, `ray status` shows those that are alive") from None
            self.facts[node.address] = facts
            self.clocks[node.address] = clocks.NodeClock(same=facts.pop("clock") == clocks.identity())
            self._ask_clock(self._agents[node.address], 20)
        return {node.address: self._agents[node.address] for node in wanted}

    def ask(self, reference: Any, pulsed: Pulsed, timeout_s: float = ASK_S) -> Any:
        """The answer of an actor. Raises the actor's UserError with the node's address, LostError when it is gone."""
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.ray.get(reference, timeout=0.5)
            except GetTimeoutError:
                if pulsed.lost or time.monotonic() > deadline:
                    raise LostError(pulsed.lost or f"{pulsed.name}: no answer for {timeout_s:g} s") from None
            except RayActorError as error:
                raise LostError(_first_line(pulsed, error)) from None
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, UserError):
                    raise UserError(f"node {pulsed.node.address}: {cause}") from None
                raise LostError(f"{pulsed.name}: {type(cause).__name__}: {cause}") from None

    def problem(self) -> str | None:
        """What was lost first, in one line; None while all is well."""
        return next((pulsed.lost for pulsed in self._pulsed if pulsed.lost), None)

    def check(self) -> None:
        """Raises UserError when a node or an actor is lost."""
        if problem := self.problem():
            raise UserError(f"{problem}; what was measured until then is kept")

    def wait(self, seconds: float) -> None:
        """Until a message came, but `seconds` at most."""
        with self._changed:
            self._changed.wait(seconds)

    def end(self, ended: Sequence[Pulsed]) -> None:
        """End these actors with all that they started; returns within a bounded time."""
        alive = [pulsed for pulsed in ended if pulsed.lost is None]
        asked = [pulsed.handle.close.remote() for pulsed in alive]
        begin_s = time.monotonic()
        while asked and time.monotonic() - begin_s < GRACE_S + 6 and any(pulsed.lost is None for pulsed in alive):
            _, asked = self.ray.wait(asked, num_returns=len(asked), timeout=0.5)
        for pulsed in ended:
            if pulsed in self._pulsed:
                self._pulsed.remove(pulsed)
            self._agents = {address: agent for address, agent in self._agents.items() if agent is not pulsed}
            self.ray.kill(pulsed.handle)

    def compare_clocks(self) -> None:
        """A dozen round trips to every agent's node, best taken."""
        for agent in self._agents.values():
            if agent.lost is None:
                self._ask_clock(agent, 12)

    def _ask_clock(self, agent: Pulsed, times: int) -> None:
        from ray.exceptions import RayError

        clock = self.clocks.get(agent.node.address)
        self._clock_asked_s[agent.node.address] = time.monotonic()
        if clock is None or clock.same:
            return
        for _ in range(times):
            sent_s = time.monotonic()
            try:
                node_s = self.ray.get(agent.handle.clock.remote(), timeout=1.0)
            except RayError:
                return
            clock.add(sent_s, node_s, time.monotonic())

    def _beat(self) -> None:
        while not self._stop.is_set():
            now_s = time.monotonic()
            for pulsed in list(self._pulsed):
                pulsed.ask_if_due(now_s)
            pending = {pulsed.pending: pulsed for pulsed in list(self._pulsed) if pulsed.pending is not None}
            ready, _ = self.ray.wait(list(pending), num_returns=len(pending), timeout=0.1) if pending else ([], [])
            for reference in ready:
                self._take(pending[reference], reference)
            self._notice_silence()
            for agent in list(self._agents.values()):
                asked_s = self._clock_asked_s.get(agent.node.address, 0.0)
                if agent.heard and agent.lost is None and agent.pending is None and now_s - asked_s > CLOCK_EVERY_S:
                    self._ask_clock(agent, 4)
            if ready:
                with self._changed:
                    self._changed.notify_all()
            self._stop.wait(0.05)

    def _take(self, pulsed: Pulsed, reference: Any) -> None:
        from ray.exceptions import ActorUnavailableError, RayActorError, RayError

        try:
            pulsed.answered(self.ray.get(reference))
        except ActorUnavailableError:
            pulsed.pending = None  # the connection broke; the next pulse asks for the same messages again
        except RayActorError as error:
            pulsed.lost, pulsed.pending = _first_line(pulsed, error), None
        except RayError as error:
            pulsed.lost, pulsed.pending = f"{pulsed.name}: {str(error).splitlines()[-1]}", None

    def _notice_silence(self) -> None:
        for pulsed in self._pulsed:
            silent_s = time.monotonic() - pulsed.heard_s
            limit_s = self.config.node_timeout_s if pulsed.heard else ASK_S
            if pulsed.lost is None and silent_s > limit_s:
                pulsed.lost = f"node {pulsed.node.address} was not heard of for {silent_s:.0f} s ({pulsed.name})"


def _first_line(pulsed: Pulsed, error: Exception) -> str:
    text = " ".join(str(error).split())
    cause = "its node died" if "node" in text.lower() and "died" in text.lower() else "its process died"
    return f"{pulsed.name} on node {pulsed.node.address} is gone: {cause}"
