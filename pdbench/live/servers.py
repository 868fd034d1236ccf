"""What servers say of themselves that this process does not load, and what devices draw meanwhile, told to the viewer."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pdbench.live import publisher
from pdbench.live.publisher import Buckets
from pdbench.power.device import Reader
from pdbench.power.sampler import Sampler
from pdbench.server_metrics import figures, samples, scrape

_EVERY_S = 1.0
_SAMPLE_S = 0.25
_HISTOGRAMS = {
    "ttft_ms": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "tbt_ms": (
        "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
        "sglang:inter_token_latency_seconds",
    ),
    "e2e_ms": ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds"),
}
_ALL_HISTOGRAMS = tuple(name for names in _HISTOGRAMS.values() for name in names)
_UPPER = re.compile(r'(?:^|,)\s*le="([^"]+)"')


@contextmanager
def followed(
    servers: Mapping[str, str], readers: Sequence[Reader], say: Callable[[str], object] | None = None
) -> Iterator[None]:
    """While the block runs: `servers` (name -> URL) have their metrics read once a second, `readers` are sampled. `say` is told, too, who
    answers and who does not."""
    ended = threading.Event()

    def follow(name: str, url: str) -> None:
        said = ""
        while True:
            page = scrape(url)
            read = figures(page) if page else {}
            if read:
                assert page is not None
                publisher.put(publisher.ServerReading(name, read, histograms(page)))
            words = "{0} answers" if read else "{0} has no metrics of vLLM or SGLang" if page else "{0} does not answer"
            if words != said:
                publisher.stage(words, name, is_problem=not read)
                if say:
                    say(words.format(name))
                said = words
            if ended.wait(_EVERY_S):
                return

    with Sampler(readers, _SAMPLE_S) as sampler, publisher.source(lambda: [publisher.Devices(sampler.latest())]):
        for name, url in servers.items():
            threading.Thread(target=follow, args=(name, url), daemon=True).start()
        try:
            yield
        finally:
            ended.set()


def histograms(page: str) -> dict[str, Buckets]:
    """Latency -> its counts, summed over the engines behind a page; those that the page lacks are left out."""
    series: dict[str, Buckets] = {}
    for name, labels, count in samples(page, _ALL_HISTOGRAMS):
        if name.endswith("_bucket") and (upper := _UPPER.search(labels)):
            counts = series.setdefault(name.removesuffix("_bucket"), {})
            counts[float(upper[1])] = counts.get(float(upper[1]), 0.0) + count
    present = {key: next((name for name in names if name in series), None) for key, names in _HISTOGRAMS.items()}
    return {key: series[name] for key, name in present.items() if name}
