"""A pair of the connector's workers, without vLLM's engine."""

import pytest

from tests.support.kv import SECRET, Instance, instances, seed_prompts
from tests.support.processes import free_port


@pytest.fixture
def kv_secret(monkeypatch):
    """The secret of the connector's workers in this process."""
    monkeypatch.setenv("PDBENCH_KV_SECRET", SECRET)


@pytest.fixture
def kv_pair(kv_secret):
    """A prefill and a decode worker."""
    port = free_port()
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode")) as pair:
        yield pair


@pytest.fixture(autouse=True)
def prompts(request):
    """Every run of a test has the same random prompts."""
    seed_prompts(request.node.nodeid)
