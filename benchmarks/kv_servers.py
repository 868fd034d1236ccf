"""Prefill and decode servers for benchmarks/kv_transfer.py, and a small client that speaks each connector's protocol.

Nothing but the standard library and psutil, which vLLM needs: it runs wherever vLLM does. A decode server without transfer parameters is the single instance to
compare with: the same process, device and CUDA graphs.
"""

import asyncio
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.processes import free_port

NIXL = {"nixl": "NixlConnector", "nixl-push": "NixlPushConnector"}
"""vLLM's own: decode reads KV, or prefill writes it."""
SERVERS = ("prefill", "decode", "single")
CONNECTORS = ("p2p-nccl", "tcp", *NIXL, "mooncake", "builtin-p2p-nccl")


@dataclass
class Timed:
    """One request as the client saw it: instants of time.monotonic(); `error` is None when it gave all its tokens."""

    transfer_id: str | None
    sent_s: float
    chunk_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        return (self.chunk_s[0] - self.sent_s) * 1e3 if self.chunk_s else None

    @property
    def tbt_ms(self) -> list[float]:
        """Gaps between the arrivals of chunks, usually of one token each."""
        return [(b - a) * 1e3 for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


@dataclass
class Pair:
    """A prefill and a decode server that run, and how a request goes through both.

    `urls` and `commands` are theirs and, where decode takes no request of its own, those of a single instance beside them.
    """

    connector: str
    urls: tuple[str, ...]
    kv: tuple[str, str]
    folder: Path
    commands: list[tuple[list[str], dict[str, str]]]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    push_source: dict[str, object] | None = None

    @property
    def single_url(self) -> str:
        return self.urls[-1]

    def launch(self, index: int) -> None:
        """Start server 0 (prefill), 1 (decode) or 2 (a single instance of its own), for the first time or again; its log goes on."""
        self.push_source = None
        command, environment = self.commands[index]
        with (self.folder / f"{self.connector}-{SERVERS[index]}.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.processes[index : index + 1] = [process]

    def signal(self, index: int, number: int) -> None:
        """Send a signal to all processes of one server."""
        os.killpg(self.processes[index].pid, number)

    def cpu_s(self) -> float:
        """Seconds of CPU that both servers have taken so far, with their engines and workers."""
        total = 0.0
        for server in self.processes:
            with suppress(psutil.NoSuchProcess):
                for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def stop(self) -> None:
        """End both process groups: the engine outlives the API server otherwise."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    pass
            if number == signal.SIGTERM:
                time.sleep(3)
        for process in self.processes:
            process.wait()

    async def ask(self, prompt: list[int], output_tokens: int, timeout_s: float = 120.0) -> Timed:
        """One streamed request through prefill and decode: NixlConnector and vLLM's own P2P connector take one after the other, the others
        both at once, NixlPushConnector once prefill's first answer has said who it is."""
        name = secrets.token_hex(12)
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(prompt, output_tokens, name, begun_s)
        except (OSError, TimeoutError, ValueError, KeyError) as error:
            return Timed(name, begun_s, error=f"{type(error).__name__}: {error}")

    async def _ask(self, prompt: list[int], output_tokens: int, name: str, begun_s: float) -> Timed:
        if self.connector == "builtin-p2p-nccl":
            both = f"___prefill_addr_{self.kv[0]}___decode_addr_{self.kv[1]}_{name}"
            await plain(self.urls[0], prompt, None, {"X-Request-Id": both})
            return await streamed(self.urls[1], prompt, output_tokens, None, name, begun_s, {"X-Request-Id": both})
        if self.connector in NIXL:
            parameters = {"do_remote_decode": True, "do_remote_prefill": False}
            both = {"X-Request-Id": name}  # NixlPushConnector's prefill writes to the decode request of the same id
            if self.push_source is not None:
                prefill = asyncio.create_task(plain(self.urls[0], prompt, parameters, both))
                source = self.push_source | {"remote_request_id": name}
                try:
                    return await streamed(self.urls[1], prompt, output_tokens, source, name, begun_s, both)
                finally:
                    await prefill
            answer = await plain(self.urls[0], prompt, parameters, both)
            source = dict(answer["kv_transfer_params"])  # type: ignore[call-overload]
            if self.connector == "nixl-push":
                of_one_request = ("remote_block_ids", "remote_num_tokens")
                self.push_source = {key: value for key, value in source.items() if key not in of_one_request}
            return await streamed(self.urls[1], prompt, output_tokens, source, name, begun_s, both)
        host, port = self.kv[0].rsplit(":", 1)
        prefill = asyncio.create_task(plain(self.urls[0], prompt, {"transfer_id": name, "do_remote_decode": True}))
        there: dict[str, object] = {"transfer_id": name, "do_remote_prefill": True}
        if self.connector == "mooncake":
            there |= {"remote_engine_id": self.kv[0], "remote_bootstrap_addr": f"http://{self.kv[0]}"}
        else:
            there |= {"remote_host": host, "remote_port": int(port)}
        try:
            return await streamed(self.urls[1], prompt, output_tokens, there, name, begun_s)
        finally:
            await prefill

    async def ask_single(self, prompt: list[int], output_tokens: int) -> Timed:
        """The same request to a single instance: the decode server alone, which prefills it itself, where its connector lets it."""
        return await streamed(self.single_url, prompt, output_tokens, None, None, time.monotonic())


def available(connector: str) -> bool:
    """Can this Python import what the connector needs?"""
    library = "nixl" if connector in NIXL else connector
    return library not in ("nixl", "mooncake") or importlib.util.find_spec(library) is not None


def start(
    connector: str,
    model: str,
    folder: Path,
    cpu: bool,
    arguments: list[str],
    transfer_timeout_s: float = 30.0,
    tensor_parallel: int = 1,
    shared_gpu: bool = False,
) -> Pair:
    """Start prefill on the first GPUs and decode on the next ones (or both on CPU); logs and event logs go to `folder`.

    With `shared_gpu` both are on GPU 0, to test without a second one: NCCL is told that they are on different hosts, since it
    joins no two ranks of one GPU, and moves KV over sockets, slowly. The caller has vLLM take less than half of the GPU each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Rank i of an instance takes its i-th KV port.
    port, kv_port = free_port(count=3), free_port(count=2 * tensor_parallel)
    ports, kv_ports = (port, port + 1), (kv_port, kv_port + tensor_parallel)
    # A request that did not pass prefill ends the decode of vLLM's own: the single instance is a third server, without connector, on decode's GPU.
    decode_alone = connector != "builtin-p2p-nccl"
    urls = tuple(f"http://127.0.0.1:{port}" for port in (*ports, *(() if decode_alone else (port + 2,))))
    kv = tuple(f"127.0.0.1:{port}" for port in kv_ports)
    commands = []
    secret = secrets.token_hex(16)
    for index, role in enumerate(("prefill", "decode")):
        transfer = _transfer(connector, role, kv_ports[index], ports[index], folder, transfer_timeout_s)
        if connector in NIXL and cpu:
            transfer["kv_buffer_device"] = "cpu"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", "m"]
        command += ["--host", "127.0.0.1", "--port", str(ports[index]), "--kv-transfer-config", json.dumps(transfer)]
        environment = os.environ | {
            "PDBENCH_KV_SECRET": secret,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        )
        environment |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_ports[index]), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
        if connector == "mooncake":
            environment |= {
                "MC_TCP_BIND_ADDRESS": "127.0.0.1",
                "MC_FORCE_TCP" if cpu else "MC_INTRANODE_NVLINK": "true",
            }
            environment["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(kv_ports[0])
        if connector == "builtin-p2p-nccl":
            environment["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
        if tensor_parallel > 1:
            command += ["--tensor-parallel-size", str(tensor_parallel)]
        if cpu:
            command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "256M"]
            # vLLM 0.32 takes one for bfloat16 alone on a processor with AMX.
            command += ["--attention-backend", "CPU_MLA"]
            command += ["--distributed-executor-backend", "uni" if tensor_parallel == 1 else "mp"]
            command += ["--max-model-len", "4096"]
            command += ["--compilation-config", '{"custom_ops":["all","-rotary_embedding"]}']
            environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        else:
            command += ["--dtype", "bfloat16", "--max-model-len", "16384"]
            command += ["--gpu-memory-utilization", "0.7" if decode_alone else "0.4"]
            first = 0 if shared_gpu else index * tensor_parallel
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = visible.split(",") if visible else [str(gpu) for gpu in range(2 * tensor_parallel)]
            environment |= {
                "CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + tensor_parallel]),
                "HF_HUB_OFFLINE": "1",
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
            }
            if shared_gpu:
                environment |= of_another_host(role)
        commands.append(([*command, *arguments], environment))
    if not decode_alone:
        command, environment = commands[1]
        at = command.index("--kv-transfer-config")
        alone = [*command[:at], *command[at + 2 :], "--kv-cache-memory-bytes", "8000000000"]
        alone[alone.index("--port") + 1] = str(port + 2)
        commands.append((alone, environment))
    pair = Pair(connector, urls, (kv[0], kv[1]), folder, commands)
    for index in range(len(commands)):
        (folder / f"{connector}-{SERVERS[index]}.log").unlink(missing_ok=True)
        pair.launch(index)
        if shared_gpu and index == 0:
            wait_healthy(pair, 400)  # two that start at once on one GPU count each other's memory as theirs
    return pair


def of_another_host(name: str) -> dict[str, str]:
    """Environment in which NCCL takes a process for one on a host of that name: it then joins processes of one GPU, over sockets."""
    return {"NCCL_HOSTID": name, "NCCL_SOCKET_IFNAME": "lo"}


def _transfer(connector: str, role: str, kv_port: int, port: int, folder: Path, timeout_s: float) -> dict[str, object]:
    """vLLM's --kv-transfer-config for one side."""
    if connector in NIXL:
        return {"kv_connector": NIXL[connector], "kv_role": "kv_both"}
    side: dict[str, object] = {"kv_role": "kv_producer" if role == "prefill" else "kv_consumer", "kv_port": kv_port}
    if connector == "mooncake":
        engine = {"engine_id": f"127.0.0.1:{kv_port}"} if role == "prefill" else {}
        return {"kv_connector": "MooncakeConnector", "kv_role": side["kv_role"], **engine}
    if connector == "builtin-p2p-nccl":
        size = 8e9 if role == "decode" else 1e1
        extra = {"http_port": str(port), "send_type": "PUT_ASYNC"}
        return side | {"kv_connector": "P2pNcclConnector", "kv_buffer_size": size, "kv_connector_extra_config": extra}
    extra = {
        "transport": "nccl" if connector == "p2p-nccl" else "tcp",
        "kv_ip": "127.0.0.1",
        "transfer_timeout_s": timeout_s,
        "event_log": str(folder / f"{connector}-{role}.jsonl"),
    }
    ours = {"kv_connector": "PdKvConnector", "kv_connector_module_path": "pdbench.kv.connector"}
    return side | ours | {"kv_load_failure_policy": "fail", "kv_connector_extra_config": extra}


def wait_healthy(pair: Pair, limit_s: float) -> str | None:
    """None when all servers that were started answer, else why not, with the log's end."""
    until_s = time.monotonic() + limit_s
    for role, url, process in zip(SERVERS, pair.urls, pair.processes, strict=False):
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until_s:
                    log = (pair.folder / f"{pair.connector}-{role}.log").read_text(errors="replace")
                    return f"{pair.connector} {role} did not start; its log ends:\n" + "\n".join(log.splitlines()[-15:])
                time.sleep(0.5)
    return None


def metrics(url: str) -> dict[str, float]:
    """Prometheus metrics, summed over their labels."""
    sums: dict[str, float] = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def request_body(
    prompt: list[int], output_tokens: int, stream: bool, transfer: dict[str, object] | None, **more: object
) -> bytes:
    body: dict[str, object] = {"model": "m", "prompt": prompt, "max_tokens": output_tokens, "stream": stream} | more
    body |= {"temperature": 0, "ignore_eos": True}
    if transfer is not None:
        body["kv_transfer_params"] = transfer
    return json.dumps(body).encode()


async def post(
    url: str, data: bytes, headers: dict[str, str] | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request; returns the connection when the status line says 200. Raises ValueError otherwise."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n{more}"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200" not in status:
        rest = await reader.read(2000)
        writer.close()
        raise ValueError(f"{status.decode().strip()} {rest.decode(errors='replace')[-300:]}")
    return reader, writer


async def plain(
    url: str, prompt: list[int], transfer: dict[str, object] | None, headers: dict[str, str] | None = None
) -> dict[str, object]:
    """A prefill request: one token, not streamed; returns the answer's JSON."""
    reader, writer = await post(url, request_body(prompt, 1, False, transfer), headers)
    try:
        answer = await reader.read()
        return dict(json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1]))
    finally:
        writer.close()


async def streamed(
    url: str,
    prompt: list[int],
    output_tokens: int,
    transfer: object,
    name: str | None,
    begun_s: float,
    headers: dict[str, str] | None = None,
) -> Timed:
    """A streamed request; the instants of its chunks."""
    timed = Timed(name, begun_s)
    body = request_body(prompt, output_tokens, True, transfer if isinstance(transfer, dict) else None)
    reader, writer = await post(url, body, headers)
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                timed.chunk_s.append(time.monotonic())
                if b'"error"' in line[:60] or b'"finish_reason":"error"' in line:
                    timed.error = line.decode().strip()[:300]
            elif line.startswith(b"data: [DONE]"):
                break
    finally:
        writer.close()
    if timed.error is None and not timed.chunk_s:
        timed.error = "no token came"
    return timed
