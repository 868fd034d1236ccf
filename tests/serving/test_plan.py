"""Which servers a deployment has."""

from dataclasses import replace

import pytest

from pdbench import nvml
from pdbench.config import DeploymentKind, ServeConfig
from pdbench.errors import UserError
from pdbench.serving import machine
from pdbench.serving.machine import Machine
from pdbench.serving.plan import assign_gpus, servers


def test_every_server_has_its_own_ports_and_the_proxy_comes_last() -> None:
    specs = servers("disaggregated", ServeConfig(prefill_instances=2, decode_instances=3, tensor_parallel=2))
    assert [spec.name for spec in specs] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "proxy"]
    assert len({spec.port for spec in specs}) == len(specs)
    assert [spec.kv_port for spec in specs[:5]] == [21001, 21003, 21005, 21007, 21009]
    assert [spec.width for spec in specs] == [2] * 5 + [0]
    assert [spec.role for spec in servers("replicas", ServeConfig())] == ["replica", "replica", "proxy"]


def test_each_role_has_its_own_width_and_kv_ports() -> None:
    config = ServeConfig(
        prefill_instances=2, decode_instances=2, prefill_tensor_parallel=1, decode_tensor_parallel=4, tensor_parallel=2
    )
    specs = servers("disaggregated", config)
    assert [(spec.width, spec.kv_port) for spec in specs[:4]] == [(1, 21001), (1, 21002), (4, 21003), (4, 21007)]
    replicas = servers("replicas", config)[:-1]
    assert [spec.width for spec in replicas] == [2] * 5  # ten GPUs, as above
    odd = ServeConfig(prefill_tensor_parallel=1, tensor_parallel=2)
    with pytest.raises(UserError, match="have 3 GPUs together, which replicas of 2 cannot use all of"):
        servers("replicas", odd)


def test_tensor_parallel_spans_two_gpus_at_least() -> None:
    widths = [servers("tensor-parallel", ServeConfig(tensor_parallel=width))[0].width for width in (1, 2, 4)]
    assert widths == [2, 2, 4]


@pytest.mark.parametrize("options", [{"prefill_instances": 0}, {"decode_instances": 0}, {"tensor_parallel": 0}])
def test_role_without_an_instance_or_gpu_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least one instance of at least one GPU"):
        servers("disaggregated", ServeConfig(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "width"), [("tensor-parallel", 1), ("single", 2)])
def test_a_server_does_not_get_a_shared_gpu_twice(
    kind: DeploymentKind, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    here = Machine("0.26.0", tuple(nvml.Gpu(index, "H100", "580", 80_000.0, 0.0) for index in range(4)))
    one = ServeConfig(prefill_gpus=(1,), decode_gpus=(1,), tensor_parallel=width)
    with pytest.raises(UserError, match=rf"{kind}-0 needs 2 different GPUs, and prefill and decode share \[1\]"):
        assign_gpus(servers(kind, one), one, here)
    with pytest.raises(
        UserError, match=r"no GPU 7 here: --decode-gpus takes indices of this host's GPUs, \[0, 1, 2, 3\]"
    ):
        assign_gpus(servers(kind, one), ServeConfig(decode_gpus=(7,)), here)
    three = replace(one, prefill_instances=2)
    with pytest.raises(UserError, match=r"prefill runs 2 instance\(s\) of \d GPU\(s\) and is given GPUs \[1\]"):
        assign_gpus(servers("replicas", three), three, here)
    two = ServeConfig(prefill_gpus=(1, 3), decode_gpus=(1, 3), tensor_parallel=2)
    assert assign_gpus(servers(kind, two), two, here) == {f"{kind}-0": (1, 3)}
