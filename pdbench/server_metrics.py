"""What servers say of themselves: their /metrics (Prometheus text), read beside a load; what their prefix caches answered; and an engine's
limits as vLLM resolved them, from what it logged as it started and from its /metrics."""

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Self
from urllib.parse import urlencode

import msgspec

from pdbench.events import EngineFacts, PrefixCacheCounts, ServerSeries
from pdbench.http import ServerUrl, get, split_url
from pdbench.records import Clock
from pdbench.serving.deployment import DeploymentInfo, ServerInfo, at_once

TIMEOUT_S = 3.0
NAMES: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "kv_used": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "accept_rate": ("sglang:spec_accept_rate",),
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_requests_total"),
    "cache_queries": ("vllm:prefix_cache_queries_total", "sglang:prompt_tokens_total"),
    "cache_hits": ("vllm:prefix_cache_hits_total", "sglang:cached_tokens_total"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total"),
    "external_tokens": ("vllm:prompt_tokens_by_source_total",),
    "output_tokens": ("vllm:generation_tokens_total", "sglang:generation_tokens_total"),
    "drafted_tokens": ("vllm:spec_decode_num_draft_tokens_total",),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens_total",),
    "queued": ("vllm:request_queue_time_seconds_count", "sglang:queue_time_seconds_count"),
    "queued_s": ("vllm:request_queue_time_seconds_sum", "sglang:queue_time_seconds_sum"),
    "kv_transfers": (
        "vllm:pdbench_kv_transfers_total",
        "vllm:nixl_xfer_time_seconds_count",
        "vllm:mooncake_xfer_time_seconds_count",
    ),
    "kv_bytes": (
        "vllm:pdbench_kv_bytes_total",
        "vllm:nixl_bytes_transferred_sum",
        "vllm:mooncake_bytes_transferred_sum",
    ),
    "kv_failures": (
        "vllm:pdbench_kv_failures_total",
        "vllm:nixl_num_failed_transfers_total",
        "vllm:mooncake_num_failed_recvs_total",
        "sglang:num_transfer_failed_reqs_total",
    ),
}
"""What is kept of a page, and the servers' names for it: of several that a page has, the first. Those to accept_rate are as
of the reading (shares of 1 where they are no requests), the others count up from the server's start."""
_LABEL = {"vllm:prompt_tokens_by_source_total": 'source="external_kv_transfer"'}
_SAMPLE = re.compile(
    r'(?P<name>[a-zA-Z_:][\w:]*)\s*(?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(?P<value>\S+)(?:\s+-?[\d.]+)?\s*(?:#.*)?$',
    re.ASCII,
)
_LARGEST = ("kv_used", "accept_rate")
"""Of several engines behind one page the largest is kept; of everything else the sum."""
_ALL_NAMES = frozenset(name for names in NAMES.values() for name in names)
_NAMED = "/metrics/?"
"""vLLM and SGLang answer this path with the named series alone, which costs them a fifth of the whole page."""
_LOG_HEAD = 4_000_000
"""Bytes of a log in which a server that starts says all of it."""


def scrape(
    url: str | ServerUrl, *, timeout_s: float = TIMEOUT_S, verify_tls: bool = True, path: str = "/metrics"
) -> str | None:
    """The metrics page of the server at `url`; None where none answers."""
    body = get(url, path, timeout_s, verify_tls=verify_tls)
    return None if body is None else body.decode("utf-8", "replace")


def samples(page: str, prefixes: str | tuple[str, ...]) -> Iterator[tuple[str, str, float]]:
    """(name, labels, value) of the lines that begin with one of `prefixes`; what is no finite count is left out."""
    for line in page.splitlines():
        # Labels may hold any character; after the value may stand a timestamp, and an exemplar after #.
        if line.startswith(prefixes) and (match := _SAMPLE.match(line)):
            try:
                value = float(match["value"])
            except ValueError:
                continue
            if 0 <= value < inf:
                yield match["name"], match["labels"] or "", value


def figures(page: str) -> dict[str, float]:
    """What a page says of `NAMES`; what it does not have is left out."""
    series: dict[str, list[float]] = {}
    for name, labels, value in samples(page, ("vllm:", "sglang:", "sglang_")):
        name = name.replace("sglang_", "sglang:", 1)  # as some of its versions write it
        if name in _ALL_NAMES and _LABEL.get(name, "") in labels:
            series.setdefault(name, []).append(value)
    found = {}
    for key, names in NAMES.items():
        values = next((series[name] for name in names if name in series), None)
        if values:
            found[key] = max(values) if key in _LARGEST else sum(values)
    return found


OnReading = Callable[[str, dict[str, float]], object]
"""Takes a server's name and its figures."""


class ServerMetrics:
    """Reads the counters of a deployment's instances (not its proxy's) while the `with` block runs.

    Each server is read by a thread of its own: one that hangs loses its own readings and delays nobody. `begin` and `end` read
    all of them once more, just before and just after the load.
    """

    def __init__(
        self,
        info: DeploymentInfo,
        clock: Clock,
        interval_s: float,
        *,
        verify_tls: bool = True,
        on_reading: OnReading = lambda server, figures: None,
    ) -> None:
        """`interval_s` 0: `begin` and `end` alone. `on_reading` gets every reading as it arrives, on its server's thread."""
        self._readers = [_Reader(server, clock, verify_tls, on_reading) for server in info.instances()]
        self._interval_s = interval_s
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        if self._interval_s:
            for reader in self._readers:
                threading.Thread(target=reader.run, args=(self._interval_s, self._stop), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def begin(self) -> None:
        """The warm-up is over and the load about to begin: what was counted until now is not the load's."""
        for reader, before in zip(self._readers, self._read(), strict=True):
            reader.before = before

    def end(self) -> dict[str, PrefixCacheCounts]:
        """The load is over. Server -> what its prefix cache answered since `begin`; those that do not tell, or were started again
        meanwhile, are left out."""
        counts = {}
        for reader, after in zip(self._readers, self._read(), strict=True):
            before, names = reader.before or {}, ("cache_queries", "cache_hits")
            if after and "cache_queries" in before and "cache_queries" in after:
                prompt_tokens, cached_tokens = (round(after.get(name, 0.0) - before.get(name, 0.0)) for name in names)
                if prompt_tokens >= 0 and cached_tokens >= 0:
                    counts[reader.server.name] = PrefixCacheCounts(reader.server.role, prompt_tokens, cached_tokens)
        return counts

    def series(self) -> list[ServerSeries]:
        """Everything that was read; those that never answered are left out."""
        return [reader.series() for reader in self._readers if reader.readings]

    def _read(self) -> list[dict[str, float] | None]:
        return at_once([reader.read for reader in self._readers])


class _Reader:
    def __init__(self, server: ServerInfo, clock: Clock, verify_tls: bool, on_reading: OnReading) -> None:
        self.server, self.readings = server, list[tuple[float, dict[str, float]]]()
        self.before: dict[str, float] | None = None
        self._clock, self._on_reading = clock, on_reading
        self._url = split_url(server.url, verify_tls=verify_tls)  # once: an https context takes long to make
        self._path, self._missed = "/metrics", 0
        self._reading = threading.Lock()

    def run(self, interval_s: float, stop: threading.Event) -> None:
        due_s = time.monotonic()
        while not stop.is_set():
            self.read()
            due_s = max(due_s + interval_s, time.monotonic())
            stop.wait(due_s - time.monotonic())

    def read(self) -> dict[str, float] | None:
        """The figures of now; None where none come in time, or none that are known."""
        with self._reading:
            begin_s = self._clock.now()
            page = scrape(self._url, path=self._path) or ""
            read = figures(page)
            if not read and self._path != "/metrics" and self._clock.now() - begin_s < TIMEOUT_S:
                self._path = "/metrics"  # whole pages are all that it has
                read = figures(scrape(self._url, path=self._path) or "")
            elif read and not self.readings:
                family = "vllm:" if "vllm:" in page else "sglang:"
                names = sorted(name for name in _ALL_NAMES if name.startswith(family))
                self._path = _NAMED + urlencode({"name[]": names}, doseq=True)
            if not read:
                self._missed += 1
                return None
            t_s = (begin_s + self._clock.now()) / 2
            self.readings.append((t_s, read))
        self._on_reading(self.server.name, read)
        return read

    def series(self) -> ServerSeries:
        with self._reading:
            keys = [key for key in NAMES if any(key in read for _, read in self.readings)]
            return ServerSeries(
                server=self.server.name,
                role=self.server.role,
                t_s=[t_s for t_s, _ in self.readings],
                values={key: [read.get(key) for _, read in self.readings] for key in keys},
                missed=self._missed,
            )


def join_series(pieces: Sequence[ServerSeries]) -> list[ServerSeries]:
    """One series per server of those of several trials, in the order of time."""
    joined: dict[str, ServerSeries] = {}
    for piece in pieces:
        before = joined.get(piece.server, ServerSeries(server=piece.server, role=piece.role))
        unknown: list[list[None]] = [[None] * len(part.t_s) for part in (before, piece)]
        joined[piece.server] = msgspec.structs.replace(
            piece,
            t_s=before.t_s + piece.t_s,
            values={
                key: before.values.get(key, unknown[0]) + piece.values.get(key, unknown[1])
                for key in before.values | piece.values
            },
            missed=before.missed + piece.missed,
            lines=before.lines + piece.lines,
        )
    return list(joined.values())


def engine_facts(info: DeploymentInfo, *, verify_tls: bool = True) -> dict[str, EngineFacts]:
    """Server -> its limits. What runs on other hosts, or logs elsewhere, tells only its /metrics."""
    servers, folder = info.instances(info.name), info.config.get("log_dir")

    def facts(server: ServerInfo) -> EngineFacts:
        log = Path(folder) / f"{server.name}.log" if folder and server.host is None and info.servers else None
        logged = ""
        if log is not None and log.is_file():
            with log.open("rb") as file:
                logged = file.read(_LOG_HEAD).decode("utf-8", "replace")
        return parse_facts(server.role, logged, scrape(server.url, verify_tls=verify_tls) or "")

    answers = at_once([functools.partial(facts, server) for server in servers])
    return {server.name: answer for server, answer in zip(servers, answers, strict=True)}


def parse_facts(role: str, log: str, page: str) -> EngineFacts:
    """The facts that a vLLM's log and metrics page have; of several starts in one log, the last one's."""

    def last(pattern: str, text: str = log) -> str | None:
        found = re.findall(pattern, text)
        return found[-1] if found else None

    def number(text: str | None) -> int | None:
        return None if text is None else int(text.replace(",", ""))

    def switch(text: str | None) -> bool | None:
        return None if text is None else text in ("True", "enabled")

    sizes = last(r"cudagraph_capture_sizes'?[:=] ?\[([\d, ]*)\]")
    info = last(r"vllm:cache_config_info\{(.*)\}", page) or ""
    blocks, size = (number(last(rf'{name}="(\d+)"', info)) for name in ("num_gpu_blocks", "block_size"))
    kv_tokens = number(last(r"KV cache size: ([\d,]+) tokens")) or number(last(r'kv_cache_size_tokens="(\d+)"', info))
    return EngineFacts(
        role=role,
        max_num_batched_tokens=number(last(r"max_num_batched_tokens'?[:=] ?(\d+)")),
        max_num_seqs=number(last(r"max_num_seqs'?[:=] ?(\d+)")),
        async_scheduling=switch(last(r"Asynchronous scheduling is (enabled|disabled)")),
        prefix_caching=switch(
            last(r"enable_prefix_caching=(True|False)") or last(r'enable_prefix_caching="(\w+)"', info)
        ),
        chunked_prefill=switch(last(r"enable_chunked_prefill=(True|False)")),
        graph_sizes=None if sizes is None else [int(word) for word in sizes.replace(",", " ").split()],
        kv_cache_tokens=kv_tokens or (blocks * size if blocks and size else None),
        block_size=size,
    )
