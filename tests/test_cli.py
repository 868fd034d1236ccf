"""Bad input is one line with the remedy and a non-zero exit code; earlier results stay."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pdbench.cli import recipe
from pdbench.config import ClusterConfig, LoadConfig, PowerConfig, ProxyConfig, ServeConfig, ServerConfig
from pdbench.errors import UserError
from tests.support.processes import ROOT, call_pdbench, free_port, wait_until
from tests.support.servers import Peer, ScriptedServer, completions, stream, tokens


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "--conector", "tcp"], "--conector"),
        (["serve", "--connector", "tpc"], "p2p-nccl"),
        (["serve", "--model", "./no-such-model"], "no model in no-such-model"),
        (["serve", "--connector", "p2p-nccl"], "--connector tcp"),
        (["serve", "--prefill-port", "65535", "--prefill-instances", "2"], "prefill-1 would listen on port 65536"),
        (["serve", "--single", "--single-port", "0"], "single-0 would listen on port 0"),
        (["serve", "--vllm-args", "--port=9000"], "use --single-port, --prefill-port or --decode-port"),
        (["serve", "--against", "single,replicas"], "serve starts one deployment"),
        (["serve", "--single", "--against", "replicas"], "serve starts one deployment"),
        (["serve", "none.toml"], "no recipe none.toml"),
        (["serve", "folder.toml"], "cannot read folder.toml: Is a directory"),
        (["serve", "recipes"], "Give a .toml file"),
        (["run", "--against", "singel"], "choose from single"),
        (["run", "--against", "single,single"], "twice"),
        (["sweep", "--against", "singel", "--vary", "seed=1"], "choose from single"),
        (["serve", "--single-gpus", "a,1"], "Give indices with commas between them, as in 0,1"),
        (["run", "--trials", "0"], "for --trials. Give 1 to 10,000,000"),
        (["bench", "--requests", "1.5"], "not a whole number"),
        (["bench", "--bogus", "3"], "Try `pdbench bench --help`"),
        (["bogus"], "Try `pdbench --help`"),
        (["bench", "--temperature", "nan"], "for --temperature. Give 0 or more"),
        (["bench", "--slo-ttft-ms=-5"], "for --slo-ttft-ms. Give a number above 0"),
        (["bench", "--idle-s=-1"], "for --idle-s. Give 0 or more"),
        (["run", "--gpu-memory-utilization", "7"], "for --gpu-memory-utilization. Give a share from 0 to 1"),
        (["run", "--requests", "0"], "for --requests. Give 1 to 10,000,000"),
        (["run", "--requests", "1e3"], "not a whole number"),
        (["bench", "--requests", "99999999999"], "for --requests. Give 1 to 10,000,000"),
        (["bench", "--warmup", "100000000"], "for --warmup. Give 0 to 10,000"),
        (["bench", "--duration-s", "1e-9"], "for --duration-s. Give 0.1 seconds or more"),
        (["bench", "--rate", "1e308"], "for --rate. Give a number above 0, 1e-9 to 1e9"),
        (["bench", "--request-timeout-s", "1e18"], "for --request-timeout-s. Give a number above 0, 1e-9 to 1e9"),
        (["bench", "--rate", "inf"], "for --rate. Give a number above 0"),
        (["bench", "--input-spread=-4"], "for --input-spread. Give a spread from 0 to 3"),
        (["bench", "--input-distribution", "uniform", "--input-spread", "2"], "uniform lengths spread by 1 at most"),
        (["bench", "--rate", "0.001", "--duration-s", "1"], "this load sends no request"),
        (["bench", "--extra-body", "[" * 20_000], "--extra-body is not JSON"),
        (["bench", "--stages", "0:5"], "this load sends no request"),
        (["bench", "--primary", "tbt"], "--primary: no metric tbt; there are ttft_p50_ms"),
        (["sweep", "--vary", "primary=e2e_p50_ms,tbt"], "--primary: no metric tbt; there are"),
        (["monitor", "--out", "/dev/null/x.json"], "cannot write into /dev/null"),
        (
            ["run", "--against", "single", "--prefill-clock", "1200", "--single-port", str(free_port())],
            "--prefill-clock 1200: no prefill server",
        ),
        (["run", "--input-tokens", "500", "--output-tokens", "64"], "--max-model-len 564"),
        (["search", "--slo", "ttft=300", "--slo-ttft-ms", "200"], "--slo-ttft-ms 200 says otherwise: give one of them"),
        (["run", "--prefill-gpus", "99"], "no GPU 99 here: leave --prefill-gpus out"),
        (["run", "--against", "single", "--decode-gpus", "1"], "no GPU 1 here: leave --decode-gpus out"),
        (["serve", "--single", "--single-gpus", "0"], "no GPU 0 here: leave --single-gpus out"),
        (["sweep", "--vary", "decode_gpus=98,99"], "no GPU 98 here"),
        (["search", "--slo", "ttft=300", "--prefill-gpus", "99"], "no GPU 99 here"),
        (["calibrate", "--against", "single", "--single-gpus", "99"], "no GPU 99 here"),
        (["bench", "--single-gpus", "99", "--no-power"], "no GPU 99 here"),
        (["serve", "--vllm-args", "'"], "no closing quotation"),
        (["sweep", "--vary", "concurrency=4,1", "--client-processes", "2"], "2 is more than --concurrency 1"),
        (["watch", "nonsense"], "pdbench: watch nonsense is not http://HOST:PORT"),
        (["bench", "--url", "http://127.0.0.1:9"], "no OpenAI-compatible server answers"),
        (["plan", "a", "--max-gpus", "4"], "--max-gpus limits a search"),
        (["plan", "a", "--deployment", "single", "--cheapest", "joules"], "--cheapest limits a search"),
        (["plan", "a", "--check", "b", "--rate", "4"], "give --deployment or --search"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(arguments: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    done = call_pdbench(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", [
    "run --against singel", "search --slo tftt=300", "bench --url ftp://host", "bench --stages 5", "plan a --deployment 3d5p",
    "monitor --gpus a", "report --picture a.svg",
    "bench --trace a --trace-from 12x", "bench --trace a --trace-for 3q", "bench --primary tbt", "run --until tbt_p99_ms",
])  # fmt: skip
def test_value_that_cannot_be_read_is_exit_code_2(wrong: str, tmp_path: Path) -> None:
    assert call_pdbench(*wrong.split(), cwd=tmp_path).returncode == 2
    assert call_pdbench("report", "no-such-folder", cwd=tmp_path).returncode == 1


def test_streams_beyond_the_limit_of_files_are_refused_before_the_load(tmp_path: Path) -> None:
    with ScriptedServer(completions()) as server:
        load = ["--url", server.url, "--requests", "80", "--concurrency", "70", "--no-power", "--warmup", "1"]
        command = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash", sys.executable, "-m", "pdbench", "bench", *load]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not any(peer.method == "POST" and peer.json.get("stream") for peer in server.requests)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "70 streams in a process, and `ulimit -n` 64 has room for" in done.stderr


def test_an_unknown_recipe_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("max_model_lenght = 3\n")
    done = call_pdbench("serve", "mine.toml", "--show", cwd=tmp_path)
    assert done.returncode == 2
    assert "max_model_lenght" in done.stderr
    assert "mine.toml" in done.stderr


@pytest.mark.parametrize("place", [0, 3], ids=["before the flags", "after them"])
def test_a_flag_overrides_the_recipe(place: int, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("max_model_len = 128\nprefill_port = 8111\n")
    words = ["--show", "--max-model-len", "256"]
    words.insert(place, "mine.toml")
    done = call_pdbench("serve", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--max-model-len 256" in done.stdout
    assert "--port 8111" in done.stdout
    assert done.stdout.count("(set PDBENCH_KV_SECRET to the same secret for all)") == 2
    assert not any(line.startswith(" ") for line in done.stdout.splitlines())


def test_slo_of_a_flag_overrides_the_recipes_limits() -> None:
    limits = {"slo_ttft_ms": 1.0, "slo_tbt_ms": 2.0, "slo": "tpot=3, e2e=4"}
    for words in (["--slo", "ttft=5"], ["--slo=ttft=5"]):
        assert recipe.without_replaced(limits, words) == {"slo_tbt_ms": 2.0, "slo": "tpot=3,e2e=4"}
    for words in (["--slo-tbt-ms", "6"], ["--slo-tbt-ms=6"]):
        assert recipe.without_replaced(limits, words)["slo"] == "e2e=4"


@pytest.mark.parametrize(
    ("recipe", "arguments", "lines"),
    [
        ("", ["--requests", "5", "--duration-s", "1"], ["--requests 5 has no effect: --duration-s ends the load"]),
        ("requests = 5\nduration_s = 1", [], ["--requests 5 has no effect: --duration-s ends the load"]),
        ("requests = 5", ["--duration-s", "1"], []),
        ("duration_s = 1", ["--requests=5"], []),
        ("", ["--rate", "9", "--steady-s", "1", "--requests", "5"], ["--requests 5 has no effect: --steady-s"]),
        ("", ["--ramp-s", "5"], ["--ramp-s 5.0 has no effect: it needs --ramp-to"]),
        ("", ["--arrival", "constant", "--prefix-groups", "2"], ["--prefix-groups 2", "--arrival constant"]),
        ("arrival = 'gamma'\nburstiness = 0.5\nrate = 9", ["--arrival", "poisson"], []),
        ("rate = 9\nrequests = 2", ["--stages", "9:1"], []),
        ("", ["--verbatim-prompts"], ["--verbatim-prompts has no effect: it needs --prompt-file"]),
        ("", ["--input-spread", "0.1", "--output-spread", "0"], ["--input-spread 0.1", "--output-spread 0"]),
    ],
)  # fmt: skip
def test_option_that_changes_nothing_is_named_unless_a_flag_overrides_the_recipe(
    recipe: str, arguments: list[str], lines: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(recipe)
    done = call_pdbench("bench", "mine.toml", "--url", "http://127.0.0.1:9", *arguments, cwd=tmp_path)
    assert "no OpenAI-compatible server answers" in done.stderr, done.stderr
    assert done.stdout.count("has no effect") == len(lines) and all(line in done.stdout for line in lines)


def test_option_of_a_sweep_is_named_only_if_it_changes_no_point(tmp_path: Path) -> None:
    command = ["sweep", "--url", "http://127.0.0.1:9", "--input-tokens", "9", "--prefix-groups", "2"]
    assert "has no effect" not in call_pdbench(*command, "--vary", "shared_prefix=0,0.5", cwd=tmp_path).stdout
    assert "--prefix-groups 2 has" in call_pdbench(*command, "--vary", "concurrency=1,2", cwd=tmp_path).stdout


def test_option_that_changes_no_prediction_is_named(tmp_path: Path) -> None:
    done = call_pdbench("plan", "nothing", "--deployment", "single", "--rate", "8", "--burstiness", "0.2", cwd=tmp_path)
    assert done.returncode == 1 and "--burstiness 0.2 has no effect: it needs --arrival gamma" in done.stdout


def test_recipe_sections_are_read_and_an_unknown_section_or_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("prefill_port = 8111\n[serve]\nmax_model_len = 128\n[load]\nrate = 2.0\n")
    done = call_pdbench("serve", "mine.toml", "--show", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--max-model-len 128" in done.stdout and "--port 8111" in done.stdout
    for text, refused in (
        ("[sever]\nmodel = 'm'\n", "no section [sever]"),
        ("[load]\nmodel = 'm'\n", "no option model in [load]"),
    ):
        (tmp_path / "mine.toml").write_text(text)
        done = call_pdbench("serve", "mine.toml", "--show", cwd=tmp_path)
        assert done.returncode != 0 and refused in done.stderr


def test_recipe_of_another_encoding_is_read_or_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes("\ufeffport = 1\r\n# é\r\n".encode())
    assert recipe.read(tmp_path / "bom.toml", "proxy") == {"port": 1}
    (tmp_path / "wide.toml").write_bytes("port = 1\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"wide\.toml is no UTF-8 text: write it as UTF-8"):
        recipe.read(tmp_path / "wide.toml", "run")


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (
            "concurrency = 4\n[load]\nconcurrency = 8\n",
            "concurrency is there twice, in no section and in [load]: keep one of them",
        ),
        (
            "[load]\nrequest-timeout-s = 9.0\nrequest_timeout_s = 8.0\n",
            "request_timeout_s is there twice, in [load] and in [load]",
        ),
        ("[load]\nno_ignore_eos = true\n", "no option no_ignore_eos in [load]"),
        ("no_ignore_eos = true\n", "no_ignore_eos is no option of a recipe: write ignore_eos = false"),
        ("[[load]]\nrate = 1.0\n", "[[load]] is a list of sections: write [load] once"),
        ("model = 2026-01-01\n", "model is a date: write text in quotes"),
        (f"requests = {'9' * 5000}\n", "is not TOML: Exceeds the limit"),
        (f"requests = {'[' * 3000}{']' * 3000}\n", "is not TOML: "),
    ],
)
def test_recipe_that_says_two_things_or_none_is_refused(text: str, refused: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    done = call_pdbench("bench", "mine.toml", cwd=tmp_path)
    assert done.returncode and done.stderr.count("\n") == 1 and refused in done.stderr


def test_section_of_a_recipe_sets_no_option_of_another_command(tmp_path: Path) -> None:
    path, sections = (
        tmp_path / "mine.toml",
        {"load": "request_timeout_s = 60.0", "proxy": "request_timeout_s = 5.0\nkv_port = 1"},
    )
    for names in (("load", "proxy"), ("proxy", "load")):
        path.write_text("\n".join(f"[{name}]\n{sections[name]}" for name in names) + "\n[serve]\nkv_port = 2\n")
        assert recipe.read(path, "run") == {"request_timeout_s": 60.0, "kv_port": 2}
        assert recipe.read(path, "proxy") == {"request_timeout_s": 5.0, "kv_port": 1}
    path.write_text(f"[proxy]\n{sections['proxy']}\n")
    assert recipe.read(path, "run") == {"kv_port": 1}
    path.write_text(f"[load]\n{sections['load']}\n")
    assert recipe.read(path, "proxy") == {}


def test_a_second_recipe_is_refused(tmp_path: Path) -> None:
    done = call_pdbench("run", "a.toml", "--trials", "1", "b.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert "a.toml and b.toml" in done.stderr


@pytest.mark.parametrize("command", ["run", "bench", "serve", "proxy"])
def test_a_recipe_may_hold_options_of_every_command(command: str, tmp_path: Path) -> None:
    recipe = "against = 'single'\nurl = 'http://127.0.0.1:1'\nfallback = 'recompute'\nslo_ttft_ms = 100.0\n"
    (tmp_path / "mine.toml").write_text(f"{recipe}vary = ['concurrency=1']\nsingle = true\ntrials = 0\n")
    done = call_pdbench(command, "mine.toml", *(["--show"] if command == "serve" else []), cwd=tmp_path)
    expected = {"serve": "", "proxy": "no prefill instance"}.get(command, "[trials] provided by mine.toml")
    assert "Unknown option" not in done.stderr
    assert expected in done.stderr


def test_compare_that_cannot_judge_is_told_from_a_condition_that_is_met(tmp_path: Path) -> None:
    done = call_pdbench("compare", "--fail-if", "tbt_p99_ms > +5%", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing measured" in done.stderr


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.toml")))
def test_every_recipe_has_only_known_keys_for_every_command(recipe: str, tmp_path: Path) -> None:
    for command in (["serve", f"{ROOT}/recipes/{recipe}", "--show"], ["doctor", f"{ROOT}/recipes/{recipe}"]):
        assert "Unknown option" not in call_pdbench(*command, cwd=tmp_path).stderr
    done = call_pdbench("run", f"{ROOT}/recipes/{recipe}", "--trials", "0", cwd=tmp_path)
    assert "for --trials" in done.stderr  # its options were all understood


def test_a_taken_port_names_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call_pdbench("serve", "--single", "--single-port", str(port), cwd=tmp_path)
    assert done.returncode == 1
    assert f"port {port} for single-0 is taken by" in done.stderr
    assert not (tmp_path / "logs").exists()
    assert str(os.getpid()) in done.stderr


def test_an_unwritable_results_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call_pdbench("run", "--out", "file/results", cwd=tmp_path)
    assert done.returncode == 1
    assert "--out" in done.stderr
    assert "starting" not in done.stdout


def test_sigterm_ends_serve_also_where_the_shell_ignores_sigint(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from pdbench.site import stop_on_signals\n"
    )
    code += "import time\nwith stop_on_signals():\n    print('up', flush=True)\n    time.sleep(60)"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"up\n"
    waiting.terminate()
    assert waiting.wait(30) != 0
    waiting.stdout.close()


def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cyclopts.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "pdbench", "--version"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        # A shell's background job ignores SIGINT, and hands that down to these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as starting:
        assert starting.stdout is not None and starting.stderr is not None
        assert starting.stdout.readline() == "importing\n"
        starting.send_signal(signal.SIGINT)
        assert starting.stderr.read() == "pdbench: interrupted\n"
        assert starting.wait(30) == 130


BENCH = ("--concurrency", "1", "--requests", "1000", "--no-power")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [2, 8], ids=["in the warm-up", "in the load"])
def test_interruption_is_one_line_that_says_what_is_saved(after: int, number: int, tmp_path: Path) -> None:
    answer, warmup = stream(tokens(4), pause_s=0.05), "3" if after == 8 else "1000"
    with (
        ScriptedServer(lambda peer: models(peer) if peer.method == "GET" else answer(peer)) as server,
        subprocess.Popen(
            [sys.executable, "-m", "pdbench", "bench", "--url", server.url, *BENCH, "--warmup", warmup],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as running,
    ):
        assert running.stderr is not None
        wait_until(lambda: sum(peer.method == "POST" for peer in server.requests) >= after, 60)
        running.send_signal(number)
        told = running.stderr.read()
        assert running.wait(60) == 130
    saved = tmp_path / "bench_results" / "bench_results.json"
    assert saved.exists() == (after == 8)
    what = "what was measured is saved in bench_results" if after == 8 else "nothing was measured yet"
    assert told == f"pdbench: interrupted: {what}\n"


def models(peer: Peer) -> bool:
    peer.respond({"data": [{"id": "m"}]})
    return True


def test_doctor_reports_every_section_and_its_verdict(tmp_path: Path) -> None:
    done = call_pdbench("doctor", cwd=tmp_path)
    for section in ("Servers start", "KV transfer", "Test and measurement"):
        assert section in done.stdout
    assert ("wrong" in done.stdout) == (done.returncode == 1)


@pytest.mark.parametrize("command", ["run", "bench", "sweep", "serve", "proxy"])
def test_help_has_every_option_of_the_command_under_a_heading(command: str) -> None:
    configs: tuple[type, ...] = {
        "serve": (ServeConfig, ClusterConfig),
        "bench": (ServerConfig, LoadConfig, PowerConfig, ClusterConfig),
        "proxy": (ProxyConfig,),
    }.get(command, (ServeConfig, LoadConfig, PowerConfig, ClusterConfig))
    printed = call_pdbench(command, "--help", cwd=ROOT).stdout
    panels = printed.split("╭─ ")[1:]
    assert len(panels) >= 4
    assert max(panel.count("│ --") for panel in panels) <= 15
    for config in configs:
        for option in fields(config):
            flag = f"│ --{option.name.replace('_', '-')} "
            assert sum(flag in panel for panel in panels) == 1, flag


@pytest.mark.parametrize("option", ["--nonce", "--model", "--out"])
def test_argument_that_is_no_text_is_one_line(tmp_path, option):
    done = call_pdbench("bench", "--url", "http://127.0.0.1:9", option, os.fsdecode(b"a\xff"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "pdbench: 'a\\udcff' is not UTF-8: write it in other letters\n"
