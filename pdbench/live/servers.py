"""What servers say of themselves that this process does not load, and what devices draw meanwhile, told to the viewer."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from pdbench.live import publisher
from pdbench.live.instances import histograms
from pdbench.power.device import Reader
from pdbench.power.sampler import Sampler
from pdbench.server_metrics import figures, scrape

_EVERY_S = 1.0
_SAMPLE_S = 0.25


@contextmanager
def followed(servers: Mapping[str, str], readers: Sequence[Reader]) -> Iterator[None]:
    """While the block runs: `servers` (name -> URL) have their metrics read once a second, `readers` are sampled."""
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
