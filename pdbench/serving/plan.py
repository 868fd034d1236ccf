"""Which servers a deployment has, and which GPUs of one host each gets. Pure: options in, specifications out."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.config import DeploymentKind, ServeConfig
from pdbench.errors import UserError
from pdbench.serving.machine import Machine


@dataclass(frozen=True)
class ServerSpec:
    """One server before it has a host. `width` is how many GPUs (without any: processes) it spans."""

    role: str
    index: int
    port: int
    width: int = 0
    kv_port: int | None = None

    @property
    def name(self) -> str:
        return self.role if self.role == "proxy" else f"{self.role}-{self.index}"


def servers(kind: DeploymentKind, config: ServeConfig) -> list[ServerSpec]:
    """All servers of a deployment, prefill before decode and the proxy last. Raises UserError when a role would have none, or a server no
    port."""
    width = config.tensor_parallel
    if kind == "single":
        specs = _role("single", 1, width, config.single_port)
    elif kind == "tensor-parallel":
        specs = _role("tensor-parallel", 1, max(2, width), config.single_port)
    elif kind == "replicas":
        specs = _role("replica", _replicas(config), width, config.prefill_port)
    else:
        # One KV port per instance, with room for one per rank: vLLM's own connector adds the rank to it.
        specs = _role("prefill", config.prefill_instances, config.width("prefill"), config.prefill_port, config.kv_port)
        after_prefill = config.kv_port + sum(spec.width for spec in specs)
        specs += _role("decode", config.decode_instances, config.width("decode"), config.decode_port, after_prefill)
    if kind in ("replicas", "disaggregated"):
        specs.append(ServerSpec("proxy", 0, config.proxy_port))
    for spec in specs:
        kv_ports = () if spec.kv_port is None else (spec.kv_port, spec.kv_port + spec.width - 1)
        for port in (spec.port, *kv_ports):
            if not 0 < port < 2**16:
                raise UserError(
                    f"{spec.name} would listen on port {port}, and ports go from 1 to 65535: give another --single-port, --prefill-port, "
                    "--decode-port, --proxy-port or --kv-port"
                )
    return specs


def _replicas(config: ServeConfig) -> int:
    """How many replicas: by default those that have as many GPUs as prefill and decode together."""
    if config.replica_instances:
        return config.replica_instances
    roles = ((config.prefill_instances, config.width("prefill")), (config.decode_instances, config.width("decode")))
    gpus, width = sum(count * width for count, width in roles), config.tensor_parallel
    if gpus % max(width, 1):
        raise UserError(
            f"prefill and decode have {gpus} GPUs together, which replicas of {width} cannot use all of: "
            "give --replica-instances, or another --tensor-parallel"
        )
    return gpus // max(width, 1)


def _role(role: str, count: int, width: int, port: int, kv_port: int | None = None) -> list[ServerSpec]:
    if count < 1 or width < 1:
        raise UserError(f"{role} needs at least one instance of at least one GPU, not {count} of {width}")
    return [
        ServerSpec(role, i, port + i, width, None if kv_port is None else kv_port + i * width) for i in range(count)
    ]


def shared_gpus(config: ServeConfig) -> tuple[int, ...]:
    """The GPUs of which each runs a prefill and a decode instance, since the options name them for both roles; of other kinds of
    deployment each runs as many instances. Raises UserError where the roles share only some of their GPUs."""
    prefill, decode = config.prefill_gpus, config.decode_gpus
    if set(prefill).isdisjoint(decode):
        return ()
    if set(prefill) != set(decode):
        raise UserError(
            f"prefill and decode share some of their GPUs ({list(prefill)} and {list(decode)}): name the same for both, or different ones"
        )
    return prefill


def check_named_gpus(config: ServeConfig, present: Sequence[int]) -> None:
    """Raises UserError for a GPU that an option names and that is not there."""
    for role in ("prefill", "decode", "single"):
        for gpu in getattr(config, f"{role}_gpus"):
            if gpu not in present and present:
                raise UserError(f"no GPU {gpu} here: --{role}-gpus takes indices of this host's GPUs, {list(present)}")
            if gpu not in present:
                raise UserError(
                    f"no GPU {gpu} here: leave --{role}-gpus out, this host has no GPU that servers could use"
                )


def assign_gpus(specs: Sequence[ServerSpec], config: ServeConfig, machine: Machine) -> dict[str, tuple[int, ...]]:
    """Server name -> its GPU indices on `machine`; empty tuples on CPU. Raises UserError when there are not enough, or one is named that
    is not there.

    Deployments that are compared get the same GPUs: those of prefill and decode, named or not, are the first that others get.
    """
    present = [gpu.index for gpu in machine.gpus] if machine.on_gpu else []
    check_named_gpus(config, present)
    if not machine.on_gpu:
        return {spec.name: () for spec in specs}
    roles = {
        role: [spec for spec in specs if spec.role == role] for role in dict.fromkeys(s.role for s in specs if s.width)
    }
    shared = shared_gpus(config)
    sizes = {role: (len(members), members[0].width) for role, members in roles.items()}
    if shared and "replica" in roles:  # replicas get what these roles share
        sizes |= {role: (getattr(config, f"{role}_instances"), config.width(role)) for role in ("prefill", "decode")}
    for role, (instances, width) in sizes.items():
        count, named = instances * width, getattr(config, f"{role}_gpus", ())
        if named and (len(named) != count or len(set(named)) != count):
            raise UserError(
                f"{role} runs {instances} instance(s) of {width} GPU(s) and is given GPUs {list(named)}: name {count} different ones"
            )
    free = [gpu for gpu in present if gpu not in config.decode_gpus or gpu in shared]
    prefill = list(config.prefill_gpus) or free[: config.prefill_instances * config.width("prefill")]
    rest = [gpu for gpu in present if gpu not in prefill]
    decode = list(config.decode_gpus) or rest[: config.decode_instances * config.width("decode")]
    # What is compared with roles that share GPUs runs as many instances on each of them.
    others = 2 * list(shared) or list(dict.fromkeys([*prefill, *decode, *present]))
    by_role = {
        "prefill": prefill,
        "decode": decode,
        "single": list(config.single_gpus) or others[: config.tensor_parallel],
    }
    assigned: dict[str, tuple[int, ...]] = {}
    for role, members in roles.items():
        count = sum(spec.width for spec in members)
        gpus = by_role.get(role, others[:count])
        if len(gpus) < count:
            beside = f" beside prefill's {len(prefill)}" if role == "decode" else ""
            remedy = f"name others with --{role}-gpus, or " if hasattr(config, f"{role}_gpus") else ""
            if len(present) == 1 and not shared and members[0].width == 1:
                remedy = f"give --prefill-gpus {present[0]} --decode-gpus {present[0]} so that all share it, or "
            raise UserError(
                f"{role} wants {count} GPU(s){beside} and there {'is' if len(present) == 1 else 'are'} {len(present)} here ({present}): "
                f"{remedy}run --against single alone"
            )
        for i, spec in enumerate(members):
            assigned[spec.name] = tuple(gpus[i * spec.width : (i + 1) * spec.width])
            if len(set(assigned[spec.name])) < spec.width:
                raise UserError(
                    f"{spec.name} needs {spec.width} different GPUs, and prefill and decode share {list(shared)}: name as many for both "
                    f"with --prefill-gpus and --decode-gpus, or leave {role} out of --against"
                )
    return assigned
