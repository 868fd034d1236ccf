"""The headings under which --help lists the options, in its order, and types that several options share."""

from typing import Annotated, Literal, TypeVar

from cyclopts import Group, Parameter

Connector = Literal["auto", "p2p-nccl", "builtin-p2p-nccl", "nixl", "tcp"]
FirstToken = Literal["prefill", "either", "decode"]
DeploymentKind = Literal["single", "replicas", "tensor-parallel", "disaggregated"]

T = TypeVar("T")
Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True, show_default=False)]
Indices = Annotated[tuple[int, ...], Parameter(show_default=False)]
VllmWords = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]

# The headings of the help, in its order.
MODEL = Group.create_ordered("Model and vLLM")
DEPLOYMENT = Group.create_ordered("Deployment")
NETWORK = Group.create_ordered("Ports and KV transfer")
CLUSTER = Group.create_ordered("Cluster")
LOAD = Group.create_ordered("Load")
ARRIVALS = Group.create_ordered("Load: arrivals")
PROMPTS = Group.create_ordered("Load: prompts and lengths")
REQUESTS = Group.create_ordered("Load: each request, and the client")
POWER = Group.create_ordered("Power and clocks")
PAIRS = Group.create_ordered("Pairs")
LIVE = Group.create_ordered("While it runs")
STATISTICS = Group.create_ordered("Statistics: limits and prices")
PROXY = Group.create_ordered("Proxy")
FAULTS = Group.create_ordered("Proxy: faults")
LIMITS = Group.create_ordered("Proxy: limits")

Model = Annotated[T, Parameter(group=MODEL)]
Network = Annotated[T, Parameter(group=NETWORK)]
Arrivals = Annotated[T, Parameter(group=ARRIVALS)]
Prompts = Annotated[T, Parameter(group=PROMPTS)]
Requests = Annotated[T, Parameter(group=REQUESTS)]
Statistics = Annotated[T, Parameter(group=STATISTICS)]
Faults = Annotated[T, Parameter(group=FAULTS)]
Limits = Annotated[T, Parameter(group=LIMITS)]
