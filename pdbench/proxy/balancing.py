"""Which instance a request takes: least work in flight, round robin, or the one that saw the same prefix before.

Try: pdbench proxy --prefill-policy prefix-affinity ...
"""

from hashlib import blake2b
from itertools import count

from pdbench.proxy.instances import ROLES, Instance, InstanceTable

_turns = {role: count() for role in ROLES}


def choose(policy: str, role: str, table: InstanceTable, prefix: bytes, tried: set[int]) -> Instance | None:
    """A ready instance of `role` outside the slots `tried`, or None. `prefix` is the prompt's beginning."""
    ready = [instance for instance in table.ready(role) if instance.slot not in tried]
    if len(ready) < 2:
        return ready[0] if ready else None
    turn = next(_turns[role])
    if policy == "round-robin":
        return ready[turn % len(ready)]
    if policy == "prefix-affinity":
        return _affine(ready, table, role, prefix)
    first = turn % len(ready)
    return min(ready[first:] + ready[:first], key=lambda instance: _work(table, instance, role))


def _work(table: InstanceTable, instance: Instance, role: str) -> tuple[int, int]:
    """Prefill's work is its prompt tokens; decode's is its running requests."""
    requests, tokens = table.load(instance)
    return (tokens, requests) if role == "prefill" else (requests, tokens)


def _affine(ready: list[Instance], table: InstanceTable, role: str, prefix: bytes) -> Instance:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): few prefixes move when an instance comes or goes. An instance
    with more than twice the mean work (and one request over) passes the request on to the next in the prefix's order."""

    def rank(instance: Instance) -> bytes:
        return blake2b(prefix, key=instance.address.url.encode()[:64], digest_size=8).digest()

    works = {instance.slot: table.load(instance)[0] for instance in ready}
    limit = 2 * sum(works.values()) / len(works) + 1
    for instance in sorted(ready, key=rank, reverse=True):
        if works[instance.slot] <= limit:
            return instance
    return min(ready, key=lambda instance: _work(table, instance, role))
