"""More than one host: instances, samplers and clients as actors of a Ray cluster; Ray is imported when --cluster is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pdbench.config import ClusterConfig

if TYPE_CHECKING:
    from pdbench.cluster.session import Cluster


@contextmanager
def joined_cluster(config: ClusterConfig | None) -> "Iterator[Cluster | None]":
    """The cluster of --cluster, left at the end with all that was started there; None without it. Raises UserError."""
    if config is None or config.cluster is None:
        yield None
        return
    from pdbench.cluster.session import Cluster

    with Cluster(config) as joined:
        yield joined
