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
from pdbench.http import netloc
from pdbench.serving.plan import ServerSpec
from pdbench.serving.vllm import Command, Setup

SERVER = """import sys
from tests.support.servers import ScriptedServer, completions
ScriptedServer(completions(0.02), host=sys.argv[1], port=int(sys.argv[2])).serve_forever()
"""

COUNTING_SERVER = """import sys, threading
from tests.support.servers import ScriptedServer, completions

requests, counting = 0, threading.Lock()
complete = completions(0.01)
LOGGED = "(EngineCore pid=9) WARNING 11-26 05:59:27 [jit_monitor.py:140] Triton kernel JIT compilation during inference: kernel_{}."

def answer(peer):
    global requests
    if peer.path.startswith("/metrics"):
        figures = {"vllm:num_preemptions_total": requests, "vllm:num_requests_waiting": 3, "vllm:kv_cache_usage_perc": 0.97}
        body = "".join(f'{name}{{engine="0"}} {value}\\n' for name, value in figures.items()).encode()
        peer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
        return True
    if peer.method == "POST":
        with counting:
            requests += 1
            if requests == 2 or requests % 9 == 0:
                print(LOGGED.format(requests), flush=True)
    return complete(peer)

ScriptedServer(answer, host=sys.argv[1], port=int(sys.argv[2])).serve_forever()
"""
"""It has vLLM's /metrics, with a preemption per request, and logs that it compiled a kernel: in its second request, and in every ninth."""


class Scripted(LocalHost):
    """`scripts`: server name -> a shell script in the place of its server; `server`: the Python program of the others."""

    server: ClassVar[str] = SERVER
    scripts: ClassVar[dict[str, str]] = {}

    def command(self, spec: ServerSpec, config: ServeConfig, gpus: tuple[int, ...], setup: Setup) -> Command:
        argv: tuple[str, ...] = (sys.executable, "-c", self.server, config.host, str(spec.port))
        if spec.name in self.scripts:
            argv = ("bash", "-c", self.scripts[spec.name])
        argv += ("--gpu-memory-utilization", str(config.gpu_memory_utilization)) if gpus else ()
        return Command(spec.name, spec.role, argv, {}, f"http://{netloc(config.host, spec.port)}", gpus)


class ScriptedRayHost(Scripted, RayHost):
    pass


if __name__ == "__main__":
    from tests.support import scripted_vllm  # as the nodes import it

    site.RaySite = functools.partial(site.RaySite, host_class=scripted_vllm.ScriptedRayHost)  # type: ignore[misc]
    cli.main(sys.argv[1:])
