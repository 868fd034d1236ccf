"""More than one host: the interface of pdbench/site.py over a Ray cluster. Ray is imported when --cluster is given."""

from collections.abc import Iterator
from contextlib import contextmanager

from pdbench.config import ClusterConfig
from pdbench.site import Site


@contextmanager
def open_site(config: ClusterConfig | None) -> Iterator[Site]:
    """The cluster of --cluster, left at the end with all that was started there; this host without it. Raises UserError."""
    if config is None or config.cluster is None:
        yield Site(restarts=config.restarts if config else 0)
        return
    from pdbench.cluster.site import RaySite

    with RaySite(config) as site:
        yield site
