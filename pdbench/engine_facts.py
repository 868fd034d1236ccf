"""Engines' limits as vLLM resolved them, from what a server logged as it started and from its /metrics."""

import functools
import re
from pathlib import Path

from pdbench.records import EngineFacts
from pdbench.server_metrics import scrape
from pdbench.serving.deployment import DeploymentInfo, ServerInfo, at_once

_LOG_HEAD = 4_000_000
"""Bytes of a log in which a server that starts says all of it."""


def engine_facts(info: DeploymentInfo, *, verify_tls: bool = True) -> dict[str, EngineFacts]:
    """Server -> its limits. What runs on other hosts, or logs elsewhere, tells only its /metrics."""
    servers, folder = info.instances(info.name), info.config.get("log_dir")

    def facts(server: ServerInfo) -> EngineFacts:
        log = Path(folder) / f"{server.name}.log" if folder and server.host is None and info.servers else None
        logged = ""
        if log is not None and log.is_file():
            with log.open("rb") as file:
                logged = file.read(_LOG_HEAD).decode("utf-8", "replace")
        return parse(server.role, logged, scrape(server.url, verify_tls=verify_tls) or "")

    answers = at_once([functools.partial(facts, server) for server in servers])
    return {server.name: answer for server, answer in zip(servers, answers, strict=True)}


def parse(role: str, log: str, page: str) -> EngineFacts:
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
