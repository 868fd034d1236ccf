"""pdbench's command line with scripted servers in vLLM's place: `python cluster_scripted.py run --cluster ...`; faults need no model."""

import functools
import sys

from pdbench import cli
from pdbench.cluster import deployment
from pdbench.serving.vllm import Command
from tests.support.servers import ScriptedServer, completions

TOKEN_S = 0.02


def plan(config, gpus, *, seat):
    """The server on its node, in the place of vLLM."""
    argv = (sys.executable, __file__, "--answer", config.host, str(seat.port))
    return Command(name=seat.name, role=seat.role, argv=argv, environment={}, url=f"http://{config.host}:{seat.port}")


if __name__ == "__main__":
    if sys.argv[1] == "--answer":
        ScriptedServer(completions(TOKEN_S), host=sys.argv[2], port=int(sys.argv[3])).serve_forever()
    else:
        from tests.support import cluster_scripted

        deployment._planner = lambda seat, connector: functools.partial(cluster_scripted.plan, seat=seat)
        cli.main(sys.argv[1:])
