"""What servers count themselves: their /metrics (Prometheus text), and what their prefix caches answered during a load."""

import functools
import re

from pdbench.http import get
from pdbench.records import PrefixCacheCounts
from pdbench.serving.deployment import DeploymentInfo, ServerInfo, at_once

_TIMEOUT_S = 3.0
_PREFIX_CACHE = (
    ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    ("sglang:prompt_tokens_total", "sglang:cached_tokens_total"),
)
"""Counters of prompt tokens, and of those among them that were in the cache."""


def scrape(url: str, *, timeout_s: float = _TIMEOUT_S, verify_tls: bool = True) -> str | None:
    """The metrics page of the server at `url`; None where none answers."""
    body = get(url, "/metrics", timeout_s, verify_tls=verify_tls)
    return None if body is None else body.decode("utf-8", "replace")


def total(page: str, name: str, label: str = "") -> float | None:
    """The sum over a metric's series (one per engine) whose labels contain `label`; None where the page has none."""
    labels = rf"\{{.*{re.escape(label)}.*\}}"
    pattern = rf"^{re.escape(name)}{labels if label else f'(?:{labels})?'} ([0-9.eE+-]+)$"
    values = [float(value) for value in re.findall(pattern, page, flags=re.MULTILINE)]
    return sum(values) if values else None


class PrefixCacheReader:
    """The prefix caches of a deployment's instances over one load: `start` before it, `stop` after it."""

    def __init__(self, info: DeploymentInfo, *, verify_tls: bool = True) -> None:
        instances = [server for server in info.servers if server.role != "proxy"]
        self._instances = instances or [ServerInfo(name="server", role="server", url=info.url)]
        self._verify_tls = verify_tls
        self._before: list[tuple[float, float] | None] = [None] * len(self._instances)

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> dict[str, PrefixCacheCounts]:
        """Instance -> its counts since `start`; those without such counters, or restarted meanwhile, are left out."""
        counts = {}
        for server, before, after in zip(self._instances, self._before, self._read(), strict=True):
            if before and after and after >= before:
                prompt_tokens, cached_tokens = (round(b - a) for a, b in zip(before, after, strict=True))
                counts[server.name] = PrefixCacheCounts(server.role, prompt_tokens, cached_tokens)
        return counts

    def _read(self) -> list[tuple[float, float] | None]:
        def counters(url: str) -> tuple[float, float] | None:
            page = scrape(url, verify_tls=self._verify_tls) or ""
            for names in _PREFIX_CACHE:
                queried, cached = (total(page, name) for name in names)
                if queried is not None:
                    return queried, cached or 0.0
            return None

        return at_once([functools.partial(counters, server.url) for server in self._instances])
