"""Scripted servers in vLLM's place, for faults, which need no model: a planner, and pdbench's command line with it on a cluster.

Try: python tests/support/scripted_vllm.py run --cluster auto --against replicas
"""

import functools
import sys

from pdbench import cli
from pdbench.cluster import site
from pdbench.config import ServeConfig
from pdbench.host import VllmPlanner
from pdbench.serving.deployment import Setup
from pdbench.serving.machine import Machine
from pdbench.serving.plan import ServerSpec
from pdbench.serving.vllm import Command

SERVER = """import sys
from tests.support.servers import ScriptedServer, completions
ScriptedServer(completions(0.02), host=sys.argv[1], port=int(sys.argv[2])).serve_forever()
"""


class ScriptedPlanner(VllmPlanner):
    """`scripts`: server name -> a shell script in the place of its server."""

    def __init__(self, scripts: dict[str, str] | None = None) -> None:
        self.scripts = scripts or {}

    def command(
        self, spec: ServerSpec, config: ServeConfig, machine: Machine, gpus: tuple[int, ...], setup: Setup
    ) -> Command:
        argv: tuple[str, ...] = (sys.executable, "-c", SERVER, config.host, str(spec.port))
        if spec.name in self.scripts:
            argv = ("bash", "-c", self.scripts[spec.name])
        return Command(spec.name, spec.role, argv, {}, f"http://{config.host}:{spec.port}")


if __name__ == "__main__":
    from tests.support.scripted_vllm import ScriptedPlanner as Planner  # as the nodes import it

    site.RaySite = functools.partial(site.RaySite, planner=Planner())  # type: ignore[misc]
    cli.main(sys.argv[1:])
