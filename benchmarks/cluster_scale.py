"""What a cluster costs the head: bring-up of 4 nodes, then 64 scripted instances and 512 simulated devices sampled every 100 ms.

The nodes are network namespaces of this machine, a real Ray node in each; only servers and devices are simulated. Needs root.
Try: python benchmarks/cluster_scale.py --instances 64 --devices 512 --seconds 30
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

SERVER = """
import http.server, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
class Server(http.server.HTTPServer):
    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask a name server for the host's name, for seconds
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--devices", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options)
        return
    from tests.support.cluster import PATIENCE_S, Hosts
    from tests.support.processes import wait_until

    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder), options.nodes, [0] * options.nodes) as hosts:
        head = hosts.all[-1]
        cpus = -(-options.instances // options.nodes)
        head.start_ray(cpus=cpus)
        wait_until(
            lambda: head.run("ls", str(hosts.ray / "ray_current_cluster")).returncode == 0, PATIENCE_S, "the head is up"
        )
        for host in hosts.all[:-1]:
            host.start_ray(head, cpus=cpus)
        hosts.wait_for_nodes(hosts.all)
        inside = ["--inside", f"{head.address}:6379", "--nodes", str(options.nodes)]
        inside += ["--instances", str(options.instances), "--devices", str(options.devices)]
        done = head.run(sys.executable, __file__, *inside, "--seconds", str(options.seconds), timeout_s=500)
        print(done.stdout)
        if done.returncode:
            sys.exit(done.stderr)


def measure(options: argparse.Namespace) -> None:
    from pdbench.cluster.ray_host import RayHost
    from pdbench.cluster.site import RaySite
    from pdbench.config import ClusterConfig, PowerConfig, ServeConfig
    from pdbench.power.device import Reader
    from pdbench.records import Clock
    from pdbench.serving.vllm import Command

    class Counting(Reader):
        """Its power is the number of the reading, so that a lost sample shows."""

        readings = 0

        def read(self, now_s: float) -> dict[str, Any]:
            self.readings += 1
            return {"power_w": float(self.readings), "gpu_utilization_pct": 50.0, "sm_clock_mhz": 1980.0}

    class SimulatedHost(RayHost):
        """Its servers are healthy and nothing else."""

        def command(self, spec: Any, config: Any, gpus: Any, setup: Any) -> Command:
            argv = (sys.executable, "-S", "-c", SERVER, config.host, str(spec.port))
            return Command(spec.name, spec.role, argv, {}, f"http://{config.host}:{spec.port}")

        def open_readers(self, servers: Any) -> list[Reader]:
            count = options.devices // options.nodes
            return [Counting(f"simulated-{index}", "gpu", "simulated", role="replica") for index in range(count)]

    config = ClusterConfig(cluster=options.inside)
    with tempfile.TemporaryDirectory() as logs, RaySite(config, SimulatedHost) as site:
        for count in (options.nodes, options.instances):
            serve = ServeConfig(replica_instances=count, log_dir=logs)
            begin_s = time.monotonic()
            deployment = site.deployment("replicas", serve)
            with contextlib.closing(deployment.start()):
                print(
                    f"bring-up of {count} instances on {options.nodes} nodes, proxy included: {time.monotonic() - begin_s:.1f} s"
                )
                if count == options.instances:
                    measurement = site.measurement(deployment.info(), PowerConfig(), Clock.start())
                    sample(site, measurement, options)


def sample(cluster: Any, measurement: Any, options: argparse.Namespace) -> None:
    own = psutil.Process()
    ray_head = [process for process in psutil.process_iter() if process.name() == "gcs_server"]
    with measurement:
        before, began_s = [sum(process.cpu_times()[:2]) for process in (own, *ray_head)], time.monotonic()
        time.sleep(options.seconds)
        ran_s = time.monotonic() - began_s
        spent = [sum(process.cpu_times()[:2]) - cpu for process, cpu in zip((own, *ray_head), before, strict=True)]
    records = measurement.devices()
    lost = sum(int(record.samples[-1].power_w) - len(record.samples) for record in records)
    samples = sum(len(record.samples) for record in records)
    missed = sum(record.sampling["missed_ticks"] or 0 for record in records)
    print(
        f"devices {len(records)}, samples {samples}, of those read lost on the way: {lost}; intervals missed by nodes: {missed:.0f}"
    )
    print(
        f"head: pdbench {spent[0] / ran_s:.3f} cores, Ray's gcs_server {sum(spent[1:]) / ran_s:.3f} cores over {ran_s:.1f} s"
    )
    uncertainty = {address: clock.uncertainty_s for address, clock in cluster.clocks.items()}
    print(f"clock uncertainty by node, s: {uncertainty}")


if __name__ == "__main__":
    main()
