"""Predictions: intervals, and what is refused with the measurement that is missing."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.plan.demand import demand_of_load
from pdbench.plan.deployment import deployment_of, parse_layout, role_of, sized
from pdbench.plan.engine import Box, Costs, Engine, Handoff, Limits, Role
from pdbench.plan.predict import predict
from pdbench.plan.records import Calibration, PowerCosts, Prediction, RoleCalibration
from pdbench.plan.seconds import PARTS, parts_of_simulated
from pdbench.plan.simulate import simulate
from pdbench.planning import CALIBRATION, plan, read_calibration
from pdbench.records import Flag, save_run
from pdbench.search.document import Document
from tests.support.runs import build_run

COSTS = Costs(
    host_decode_s=0.002,
    host_prefill_s=0.03,
    host_per_prompt_token_s=1e-6,
    gpu_decode_s={1: 0.004, 8: 0.004, 16: 0.005},
    gpu_per_sequence_s=1e-4,
    gpu_per_context_token_s=0.0,
    gpu_prefill_s=0.001,
    gpu_per_prompt_token_s=1e-5,
    ingress_s=0.005,
)
HANDOFF = Handoff(steps=4.0)
WATTS = PowerCosts(idle_w=120, decode_w=320, sequence_w=2, prefill_w=70, prompt_token_j=0.006, windows=60, residual_w=9)


def role(sure: float = 0.05, **costs: object) -> RoleCalibration:
    """An engine whose price of a prompt token is known to `sure`."""
    engine = Engine(
        costs=msgspec.structs.replace(COSTS, **({"noise": ((1.0, 1.1, 0.9, 1.0),)} | costs)),
        limits=Limits(max_num_batched_tokens=8192, max_num_seqs=64, captured=16),
        box=Box(prompt_tokens=4096, sequences=16, context_tokens=40_000),
    )
    samples = [
        [0.03, 1e-6, 0.001, 1e-5 * float(np.exp(sure * step)), 0.0, 1.0, 0.002] for step in np.linspace(-1.7, 1.7, 21)
    ]
    return RoleCalibration(
        engine=engine, samples=samples, speeds=[0.98, 1.0, 1.02], power=WATTS, prompt_lengths=(900, 2100)
    )


def calibration(**changes: object) -> Calibration:
    roles: dict[Role, RoleCalibration] = {"prefill": role(), "decode": role(ingress_s=0.0), "single": role()}
    made = Calibration(sources=[], roles=roles, handoff=HANDOFF)
    return msgspec.structs.replace(made, **changes)


def predicted(
    found: Calibration, wanted: str = "single", rate: float = 2.0, input_tokens: int = 1500, **load: int
) -> Prediction:
    config = LoadConfig(rate=rate, requests=80, input_tokens=input_tokens, output_tokens=load.pop("output_tokens", 32))
    return predict(
        found, parse_layout(wanted), lambda draw: [demand_of_load(config, draw)], "", slo=(400.0, None), draws=12
    )


def test_few_draws_have_the_usual_day_in_their_middle() -> None:
    """A day's speed is spread evenly over the draws: their median is no matter of luck."""
    usual = calibration(roles={"single": msgspec.structs.replace(role(noise=((1.0,),)), samples=role().samples[10:11])})
    answer = predicted(usual, rate=0.1).figures["ttft_p50_ms"]
    config = LoadConfig(rate=0.1, requests=80, input_tokens=1500, output_tokens=32)
    of_usual = simulate(deployment_of(usual, parse_layout("single")), demand_of_load(config, 0))
    assert answer.value == pytest.approx(1e3 * np.median(of_usual.ttft_s), rel=0.015)
    assert answer.high > 1.2 * answer.value


def test_pauses_of_another_run_are_in_the_interval_of_the_slowest_gaps() -> None:
    def width(jitter: list[float]) -> float:
        roles = {"single": msgspec.structs.replace(role(), jitter=jitter)}
        figure = predicted(calibration(roles=roles), rate=0.1).figures["tbt_p99_ms"]
        return figure.high / figure.low

    # Another start of a host had 2.3 times longer ones.
    assert width([0.0] * 95 + [3.0] * 5) > 2.3 * width([0.0] * 100)


def test_rates_are_no_surer_than_the_window_they_are_counted_in() -> None:
    rate = predicted(calibration()).figures["output_tokens_per_s"]
    assert rate.high > 1.045 * rate.value and rate.low < 0.955 * rate.value


def test_figures_lie_in_their_intervals() -> None:
    answer = predicted(calibration())
    assert answer.refusal is None
    assert not answer.saturated
    for figure in answer.figures.values():
        assert figure.low <= figure.value <= figure.high
    # 5 ms on the way in, 31.5 ms of launch: what a lone request waits at least.
    assert 36 < answer.figures["ttft_p50_ms"].value < 50
    assert answer.figures["slo_met_pct"].value > 95


def test_an_engine_of_more_gpus_is_not_put_together_from_fewer() -> None:
    roles = {name: msgspec.structs.replace(role(), gpus=gpus) for name, gpus in (("prefill", 1), ("decode", 2))}
    found = calibration(roles=roles)
    assert sized(found, parse_layout("3p2d")).gpus == 7
    with pytest.raises(UserError, match="no run shows a single engine"):
        role_of(found, "single")


def test_another_day_is_another_day_for_the_gpu_too() -> None:
    """With CUDA graphs of a prompt's length its step is the GPU's work, and what differs between trials is that."""
    on_gpu = {"host_prefill_s": 0.002, "host_per_prompt_token_s": 0.0, "gpu_per_prompt_token_s": 2e-5}
    samples = [[0.002, 0.0, 0.001, 2e-5, 0.0, 1.0, 0.002]]
    found = calibration(roles={"single": msgspec.structs.replace(role(**on_gpu), samples=samples)})
    ttft = predicted(found).figures["ttft_p50_ms"]
    assert ttft.high > 1.2 * ttft.low


def test_prompts_of_which_little_is_computed_are_outside_the_lengths() -> None:
    unsure = calibration(roles={"single": role(sure=1.0)})
    shared = LoadConfig(rate=2.0, requests=80, input_tokens=1500, output_tokens=32, shared_prefix=0.9)
    found = predict(unsure, parse_layout("single"), lambda draw: [demand_of_load(shared, draw)], "", draws=4)
    assert found.refusal and "prompts of 156 tokens to compute" in found.refusal


def test_requests_longer_than_the_servers_take_are_refused() -> None:
    made = role()
    limits = msgspec.structs.replace(made.engine.limits, max_model_len=1520)
    engine = msgspec.structs.replace(made.engine, limits=limits)
    found = calibration(roles={"single": msgspec.structs.replace(made, engine=engine)})
    answer = predicted(found, rate=1000.0)
    assert answer.refusal and "80 of 80 requests are longer than the 1,520 tokens of --max-model-len" in answer.refusal
    assert not answer.saturated, "nothing that would be refused makes a queue"


def test_instances_have_prefix_caches_of_their_own() -> None:
    config = LoadConfig(rate=5.0, requests=400, input_tokens=1600, shared_prefix=0.5, prefix_groups=50, warmup=10)
    load, made = demand_of_load(config, 0), calibration()
    cached = {
        count: sum(simulate(deployment_of(made, parse_layout(f"replicas:{count}")), load).instances[0].pool.cached)
        for count in (1, 8)
    }
    assert cached[1] == load.cached_tokens.sum() == (350 + 10) * 800  # the warm-up met ten groups
    assert cached[8] < 0.6 * cached[1]


def test_rates_and_joules_are_of_the_time_at_full_load() -> None:
    """As `bench` measures them: short loads, whose filling and draining take as long as they, say the same as long ones."""
    short, long = (
        predict(
            calibration(),
            parse_layout("replicas:2"),
            lambda draw, count=count: [
                demand_of_load(LoadConfig(rate=8.0, requests=count, input_tokens=1500, output_tokens=200), draw)
            ],
            "",
            slo=(5000.0, None),
            draws=8,
            anyway=True,
        ).figures
        for count in (40, 1000)
    )
    for name in ("output_tokens_per_s", "goodput_requests_per_s", "j_per_output_token", "mean_power_w"):
        assert short[name].value == pytest.approx(long[name].value, rel=0.12), name


@pytest.mark.parametrize(("count", "outputs"), [(1, 200), (16, 1)])
def test_requests_that_keep_the_limits_and_tokens_are_counted_alike(count: int, outputs: int) -> None:
    load = LoadConfig(rate=2.0, requests=count, input_tokens=1500, output_tokens=outputs)
    figures = predict(
        calibration(),
        parse_layout("single"),
        lambda draw: [demand_of_load(load, draw)],
        "",
        slo=(5000.0, None),
        draws=4,
    ).figures
    tokens_per_s, goodput = (figures[name].value for name in ("output_tokens_per_s", "goodput_requests_per_s"))
    assert tokens_per_s == pytest.approx(outputs * goodput)
    if count == 1:
        assert tokens_per_s == pytest.approx(1e3 * outputs / figures["e2e_p50_ms"].value, rel=0.02)


def test_a_load_that_waits_for_streams_grows() -> None:
    load = LoadConfig(rate=20.0, concurrency=1, requests=300, input_tokens=1500, output_tokens=32)
    found = predict(calibration(), parse_layout("single"), lambda draw: [demand_of_load(load, draw)], "", draws=4)
    assert found.saturated


def test_disaggregation_sums_the_power_of_all_its_instances() -> None:
    figures = predicted(calibration(), "2p1d").figures
    assert 3 * 120 < figures["mean_power_w"].value < 3 * 420
    assert figures["mean_power_w"].value == pytest.approx(
        figures["prefill_power_w"].value + figures["decode_power_w"].value, rel=0.02
    )


def test_arrivals_are_those_of_bench() -> None:
    config = LoadConfig(rate=5.0, requests=50, input_tokens=1000, input_distribution="lognormal", output_tokens=8)
    first, again, other = (demand_of_load(config, trial) for trial in (0, 0, 1))
    assert np.array_equal(first.t_s, again.t_s) and np.array_equal(first.prompt_tokens, again.prompt_tokens)
    assert not np.array_equal(first.prompt_tokens, other.prompt_tokens)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("phase", "decode", "--phase decode"),
        ("ignore_eos", False, "--no-ignore-eos"),
        ("extra_body", '{"max_tokens": 4}', "--extra-body"),
        ("drop_fields", ("ignore_eos",), "--drop-fields"),
        ("drop_fields", ("seed,ignore_eos",), "--drop-fields"),
    ],
)
def test_loads_of_which_answers_are_not_as_long_as_asked_are_refused(option: str, value: object, words: str) -> None:
    load = LoadConfig(concurrency=4, requests=4, input_tokens=100, output_tokens=8)
    assert len(demand_of_load(load, 0)) == 4
    with pytest.raises(UserError, match=words):
        demand_of_load(replace(load, **{option: value}), 0)


def test_blocks_that_were_cut_off_a_trace_are_in_no_cache(tmp_path: Path) -> None:
    rows = [([1, 2], 1024), ([2], 512), ([1, 3], 1024)]
    records = [
        {"timestamp": 1000 * at, "input_length": tokens, "output_length": 4, "hash_ids": blocks}
        for at, (blocks, tokens) in enumerate(rows)
    ]
    (tmp_path / "trace.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, records)))
    config = LoadConfig(trace=str(tmp_path / "trace.jsonl"), max_input_tokens=512)
    assert demand_of_load(config, 0).cached_tokens.tolist() == [0, 0, 512]


def test_larger_batches_than_measured_are_refused() -> None:
    refusal = predicted(calibration(), rate=6.0, output_tokens=400).refusal
    assert refusal and "sequences" in refusal and "--rate" in refusal


def test_longer_prompts_are_refused_where_a_token_has_no_price() -> None:
    found = calibration(roles={"single": role(sure=1.0)})
    refusal = predicted(found, input_tokens=4000).refusal
    assert refusal and "lognormal" in refusal
    assert predicted(calibration(), input_tokens=2400).refusal is None


def test_restless_machine_is_refused() -> None:
    refusal = predicted(calibration(drift=1.7)).refusal
    assert refusal and "drifts" in refusal


def test_unmeasured_handoff_is_refused() -> None:
    answer = predicted(calibration(handoff=None), "1p1d")
    assert answer.refusal and "handoff" in answer.refusal
    assert not answer.figures


def test_command_fails_where_no_deployment_is_predicted_and_keeps_its_tables(tmp_path: Path) -> None:
    load = LoadConfig(rate=2.0, requests=40, input_tokens=1500, output_tokens=32)
    for handoff, fails in ((HANDOFF, False), (None, True)):
        folder = tmp_path / str(fails)
        folder.mkdir()
        (folder / CALIBRATION).write_bytes(msgspec.json.encode(calibration(handoff=handoff)))
        with pytest.raises(UserError, match="no deployment is predicted") if fails else nullcontext():
            plan([folder], (), ["1p1d"], load, folder, Console(quiet=True))
        assert "1p1d" in (folder / "plan.md").read_text().lower()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slo_e2e_ms": 900.0}, "not by --slo-e2e-ms"),
        ({"slo_tbt_p99_ms": 9.0}, "not by --slo-tbt-p99-ms"),
        ({"slo_ttft_ms": 900.0, "concurrency": 2}, "leave --concurrency out"),
    ],
)
def test_limits_that_predictions_do_not_count_by_are_refused(tmp_path: Path, options: dict, words: str) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration()))
    load = LoadConfig(rate=2.0, requests=40, input_tokens=1500, output_tokens=32, **options)
    with pytest.raises(UserError, match=words):
        plan([tmp_path], (), [], load, tmp_path / "out", Console(quiet=True), most_gpus=2)
    assert not (tmp_path / "out").exists()


def test_a_check_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration(drift=1.1)))
    out = tmp_path / "out"
    load = LoadConfig(rate=2.0, requests=40, input_tokens=1500, output_tokens=32)
    plan([tmp_path], (), ["single", "single"], load, out, Console(quiet=True))
    assert len(msgspec.json.decode((out / "predictions.json").read_bytes())) == 1
    before = {path: path.read_bytes() for path in out.iterdir()}
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration(drift=1.2)))
    with pytest.raises(UserError, match=r"no \*_results.json"):
        plan([tmp_path], (tmp_path / "nothing",), [], LoadConfig(), out, Console(quiet=True))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_plan_leaves_nothing_of_an_earlier_call_and_all_of_a_measured_search(tmp_path: Path) -> None:
    load = LoadConfig(rate=2.0, requests=40, input_tokens=1500, output_tokens=32, slo_ttft_ms=5000.0)
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration()))
    out = tmp_path / "plan"
    plan([tmp_path], (), [], load, out, Console(quiet=True), most_gpus=2)
    assert (out / "search.json").exists() and (out / "search.png").exists()
    plan([tmp_path], (), [], LoadConfig(), out, Console(quiet=True))
    assert {path.name for path in out.iterdir()} <= {CALIBRATION, "plan.md", "steps.png", ".plan-files"}
    measured = msgspec.json.encode(Document(command={}, slo={}, attain_pct=99.0))
    (out / "search.json").write_bytes(measured)
    with pytest.raises(UserError, match="holds what `pdbench search` measured"):
        plan([tmp_path], (), [], load, out, Console(quiet=True))
    assert (out / "search.json").read_bytes() == measured


def test_request_larger_than_the_kv_cache_is_refused() -> None:
    small = role()
    limits = msgspec.structs.replace(small.engine.limits, kv_cache_tokens=1024)
    small = msgspec.structs.replace(small, engine=msgspec.structs.replace(small.engine, limits=limits))
    refusal = predicted(calibration(roles={"single": small})).refusal
    assert refusal and "KV cache" in refusal


def test_role_that_no_run_shows_names_the_run() -> None:
    with pytest.raises(UserError, match="--against single"):
        role_of(calibration(roles={"decode": role()}), "single")


def test_single_engine_is_put_together_from_prefill_and_decode() -> None:
    roles = {"prefill": role(host_prefill_s=0.05), "decode": role(gpu_per_sequence_s=3e-4)}
    costs = role_of(calibration(roles=roles), "single").engine.costs
    assert (costs.host_prefill_s, costs.gpu_per_sequence_s) == (0.05, 3e-4)


@pytest.mark.parametrize(
    ("words", "instances"),
    [("single", {"single": 1}), ("replicas:4", {"replica": 4}), ("3p5d", {"prefill": 3, "decode": 5})],
)
def test_deployment_is_read(words: str, instances: dict[str, int]) -> None:
    assert parse_layout(words).instances == instances


@pytest.mark.parametrize("words", ["", "replicas", "p2d", "0p1d", "99999999999p1d", "٣p1d", "replicas:10001"])
def test_other_deployments_are_refused(words: str) -> None:
    with pytest.raises(UserError):
        predict(calibration(), parse_layout(words), lambda draw: [], "")


def test_saved_calibration_is_read_again(tmp_path: Path) -> None:
    made = calibration()
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(made))
    assert read_calibration([tmp_path], Console(quiet=True)) == made
    other = b'{"schema": "pdbench-plan/0", "sources": [], "roles": {}}'
    for content in (other, b'{"schema": "\xff"}', b'{"roles": ' + b"[" * 200_000):
        (tmp_path / CALIBRATION).write_bytes(content)
        with pytest.raises(UserError, match="calibrate by its runs again"):
            read_calibration([tmp_path], Console(quiet=True))


@pytest.mark.parametrize(("wanted", "opens"), [("single", 1.0), ("2p1d", 1.0), ("1p2d", 0.0)])
def test_parts_of_the_mean_request_add_up(wanted: str, opens: float) -> None:
    found = calibration(handoff=Handoff(steps=4.0, prefill_opens=opens), proxy_s=0.002)
    config = LoadConfig(rate=6.0, requests=80, input_tokens=1500, output_tokens=32)
    demand, layout = demand_of_load(config, 0), parse_layout(wanted)
    # A run that is checked names its roles in any order.
    layout = msgspec.structs.replace(layout, instances=dict(reversed(layout.instances.items())))
    deployment = deployment_of(found, layout)
    result = simulate(deployment, demand)
    parts = parts_of_simulated([result])
    assert sum(parts.values()) == pytest.approx(1e3 * result.e2e_s.mean(), rel=1e-6)
    assert set(parts) == ({"way_in", "queue", "compute", "decode"} if wanted == "single" else set(PARTS))
    assert parts["way_in"] == pytest.approx(5 if wanted == "single" else 7) and min(parts.values()) >= 0
    assert parts["compute"] > 30, "a prompt's step is launched for 30 ms at least"


def test_runs_that_do_not_count_or_count_twice_are_refused(tmp_path: Path) -> None:
    run = build_run("single", trials=1, requests=30)
    for request in run.requests:
        request.counted_by = "token_ids"
    for name in ("a", "b"):
        save_run(run, tmp_path / name)
    with pytest.raises(UserError, match="hold the same run"):
        read_calibration([tmp_path / "a", tmp_path / "b"], Console(quiet=True))
    run.flags.append(Flag("canary-failed", "a wrong answer"))
    save_run(run, tmp_path / "a")
    with pytest.raises(UserError, match="a: canary-failed: a wrong answer; its figures do not count: leave it out"):
        read_calibration([tmp_path / "a"], Console(quiet=True))


def test_calibration_that_somebody_edited_says_so_in_every_later_copy(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_bytes(msgspec.json.encode(calibration()))
    saved, again = tmp_path / "saved", tmp_path / "again"
    plan([tmp_path], (), [], LoadConfig(), saved, Console(quiet=True))
    written = (saved / CALIBRATION).read_bytes()
    assert not read_calibration([saved], Console(quiet=True)).missing
    (saved / CALIBRATION).write_bytes(written.replace(b'"drift": 1.', b'"drift": 1.0'))
    assert (saved / CALIBRATION).read_bytes() != written
    plan([saved], (), [], LoadConfig(), again, Console(quiet=True))
    (told,) = read_calibration([again], Console(quiet=True)).missing
    assert "was edited after it was saved" in told
