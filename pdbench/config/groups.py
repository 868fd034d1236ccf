"""The headings under which --help lists the options, in its order, and what several options have in common there."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter, Token

T = TypeVar("T")


def _indices(kind: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """Raises ValueError for anything but whole numbers with commas between them."""
    words = [word for token in tokens for word in token.value.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError("Give indices with commas between them, as in 0,1.")
    return tuple(map(int, words))


Connector = Literal["auto", "p2p-nccl", "builtin-p2p-nccl", "nixl", "nixl-push", "mooncake", "tcp"]
Policy = Literal["least-work", "round-robin", "prefix-affinity"]
FirstToken = Literal["prefill", "either", "decode"]
DeploymentKind = Literal["single", "replicas", "tensor-parallel", "disaggregated"]
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True, show_default=False)]
Indices = Annotated[tuple[int, ...], Parameter(converter=_indices, n_tokens=1, show_default=False)]
VllmWords = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]

Model = Annotated[T, Parameter(group=Group.create_ordered("Model and vLLM"))]
DEPLOYMENT = Group.create_ordered("Deployment")
Network = Annotated[T, Parameter(group=Group.create_ordered("Ports and KV transfer"))]
CLUSTER = Group.create_ordered("Cluster")
LOAD = Group.create_ordered("Load")
Arrivals = Annotated[T, Parameter(group=Group.create_ordered("Load: arrivals"))]
Prompts = Annotated[T, Parameter(group=Group.create_ordered("Load: prompts and lengths"))]
Requests = Annotated[T, Parameter(group=Group.create_ordered("Load: each request, and the client"))]
POWER = Group.create_ordered("Power and clocks")
PAIRS = Group.create_ordered("Pairs")
LIVE = Group.create_ordered("While it runs")
Statistics = Annotated[T, Parameter(group=Group.create_ordered("Statistics: limits and prices"))]
PROXY = Group.create_ordered("Proxy")
Faults = Annotated[T, Parameter(group=Group.create_ordered("Proxy: faults"))]
Limits = Annotated[T, Parameter(group=Group.create_ordered("Proxy: limits"))]
