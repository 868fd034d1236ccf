"""Scripted servers in vLLM's place, for faults, which need no model; as a script, pdbench's command line with them on a cluster.

Try: python tests/support/scripted_vllm.py run --cluster auto --against replicas
"""

import functools
import sys
from typing import ClassVar

from pdbench import cli
from pdbench.cluster import site
from pdbench.cluster.ray_host import RayHost
from pdbench.config import ServeConfig
from pdbench.host import LocalHost
from pdbench.serving.plan import ServerSpec
from pdbench.serving.vllm import Command, Setup

SERVER = """import sys
from tests.support.servers import ScriptedServer, completions
ScriptedServer(completions(0.02), host=sys.argv[1], port=int(sys.argv[2])).serve_forever()
"""


class Scripted(LocalHost):
    """`scripts`: server name -> a shell script in the place of its server."""

    scripts: ClassVar[dict[str, str]] = {}

    def command(self, spec: ServerSpec, config: ServeConfig, gpus: tuple[int, ...], setup: Setup) -> Command:
        argv: tuple[str, ...] = (sys.executable, "-c", SERVER, config.host, str(spec.port))
        if spec.name in self.scripts:
            argv = ("bash", "-c", self.scripts[spec.name])
        return Command(spec.name, spec.role, argv, {}, f"http://{config.host}:{spec.port}")


class ScriptedRayHost(Scripted, RayHost):
    pass


if __name__ == "__main__":
    from tests.support import scripted_vllm  # as the nodes import it

    site.RaySite = functools.partial(site.RaySite, host_class=scripted_vllm.ScriptedRayHost)  # type: ignore[misc]
    cli.main(sys.argv[1:])
