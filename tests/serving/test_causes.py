"""What logs say: the cause of a death wherever it stands, what is no cause, and what a living server says during a load."""

import time
from pathlib import Path

import pytest

from pdbench.serving.causes import engine_died, likely_cause, lines_of_load
from pdbench.serving.process import LogWatch, cause_of_death

LOGS = Path(__file__).parents[1] / "data" / "dead_engines"
ENGINE = "(EngineCore pid=75) ERROR 11-25 23:38:31 [core.py:1510] "
API = "(APIServer pid=28) "
INITIALIZATION = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("compiler-missing", 188, ["no C++ compiler works here: install g++", "InvalidCxxCompiler: No working C++"]),
        ("libstdcxx-too-old-vllm-0.10.2", 2, ["libstdc++ is too old here", "GLIBCXX_3.4.32' not found"]),
        ("nixl-missing", 101, ["pip install nixl, or use another --connector", "RuntimeError: NIXL is not available"]),
    ],
)
def test_cause_of_real_engines_is_found_with_its_line(name: str, line: int, words: list[str]) -> None:
    cause = cause_of_death(LOGS / f"{name}.log") or ""
    assert f"(line {line} of its log: " in cause and all(word in cause for word in words)
    assert len(cause.splitlines()) == 1


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            f"{ENGINE}Traceback (most recent call last):\n{ENGINE}KeyError: 'rope_scaling'\n{API}{INITIALIZATION}",
            "KeyError: 'rope_scaling' (line 2 of its log)",
        ),
        (
            "Traceback\n  assert a == b\n         ^^^^^^\nAssertionError",
            "AssertionError at `assert a == b` (line 4 of its log)",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, bad thing",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, bad thing "
            "(line 1 of its log)",
        ),
        (
            f"{ENGINE}ValueError: root\nOSError: later\nException ignored in: f\nKeyError: 1",
            "ValueError: root (line 1 of its log)",
        ),
        ("WARNING 11-25 23:38:12 [u.py:2] like `OSError: [Errno 24] Too many open files`", None),
        ("Uvicorn running\nlast words", None),
    ],
    ids=["engine", "assertion", "pydantic", "what follows", "warning", "nothing"],
)
def test_unknown_error_is_shown_with_its_line(log: str, cause: str | None) -> None:
    assert likely_cause(log) == cause


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            f"{ENGINE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n{INITIALIZATION}",
            "use more GPUs",
        ),
        (
            f"{ENGINE}ValueError: To serve at least one request with the models's max seq len (163840), 42 GiB KV cache is needed, "
            f"which is larger than the available KV cache memory (3 GiB).\n{INITIALIZATION}",
            "lower --max-model-len",
        ),
        (f"{API}OSError: [Errno 98] Address already in use", "its port is taken"),
        ("ModuleNotFoundError: No module named 'vllm'", "a package is missing"),
        ("Out of memory: Killed process 7 (python)", "the system ended it"),
        ("RuntimeError: No CUDA GPUs are available", "nvidia-smi"),
        ("error: unrecognized arguments: --nonsense", "--vllm-args"),
    ],
    ids=["memory", "does not fit", "port stolen", "package", "killed", "no GPU", "option"],
)
def test_known_sign_brings_its_remedy(log: str, words: str) -> None:
    assert words in (likely_cause(log) or "")


def test_package_that_was_missed_on_the_way_is_not_the_cause() -> None:
    optional = "Traceback\nModuleNotFoundError: No module named 'flashinfer'\n"
    cause = likely_cause(f"{optional}{ENGINE}ValueError: heads do not divide\n{API}{INITIALIZATION}")
    assert cause == "ValueError: heads do not divide (line 3 of its log)"


def test_error_that_the_server_survived_is_not_the_cause() -> None:
    served = 'INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK\n'
    error = "(APIServer pid=7) ERROR 11-28 13:13:13 [serving.py:500] ModuleNotFoundError: No module named 'lmformatenforcer'\n"
    died = "(APIServer pid=7) WARNING 11-28 13:15:14 [core_client.py:817] [shutdown] MPClient: engine core exited unexpectedly\n"
    assert "ended from outside" in (likely_cause(f"{error}{served}{died}") or "")
    assert "(line 2 of its log" in (likely_cause(f"{served}{error}{died}{served}") or "")
    assert "a package is missing" in (likely_cause(f"{served}{error}{died}{served}") or "")


def test_engine_that_was_killed_is_dead_before_its_server(tmp_path: Path) -> None:
    (log := tmp_path / "single-0.log").write_text(
        "(APIServer pid=3) INFO 11-25 23:38:31 [c.py:3] EngineDeadError is a word\n"
    )
    watch = LogWatch(log)
    assert not watch.look()
    with log.open("a") as file:
        file.write(
            "(APIServer pid=3) WARNING 11-25 23:38:31 [c.py:3] [shutdown] MPClient: engine core exited unexpectedly; st"
        )
        file.flush()
        assert not watch.look()
        file.write("arting cleanup\n")
    assert watch.look() and not LogWatch(log, from_now=True).look()
    assert "ended from outside" in (likely_cause(log.read_text()) or "")
    assert engine_died("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.")


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (
            "(EngineCore pid=9) WARNING 11-26 05:59:27 [jit_monitor.py:140] Triton kernel JIT compilation during inference: _fwd_kernel. "
            "This causes a latency spike; consider extending warmup to cover this shape/config.",
            "compiled-under-load",
        ),
        (
            "(EngineCore pid=9) INFO 11-26 05:59:27 [backends.py:398] Compiling a graph for compile range (1, 512) takes 3.21 s",
            "compiled-under-load",
        ),
        ("Triton autotuning for function matmul finished after 3.02s; best config selected: x;", "compiled-under-load"),
        (
            "(EngineCore pid=9) WARNING 11-26 05:59:27 [scheduler.py:3427] Recovered from KV load failure: 1 request(s) rescheduled (9 tokens "
            "affected).",
            "kv-load-failed",
        ),
        (
            "(EngineCore pid=9) WARNING 11-26 05:59:27 [receiver.py:148] KV transfer failed: abc: peer is gone",
            "kv-load-failed",
        ),
        (
            "WARNING 11-26 05:59:27 [x.py:5] FlyDSL decode is unavailable (x). Falling back to Triton.",
            "fallback-under-load",
        ),
        (f"{ENGINE}Unexpected error pre-processing request 7", "server-error"),
        ("\x1b[31mERROR\x1b[0m:    Exception in ASGI application", "server-error"),
    ],
)
def test_line_of_a_living_server_is_known(line: str, flag: str) -> None:
    (found,) = lines_of_load(f"INFO 11-26 05:59:27 [x.py:1] before\n{line}\nafter", 3.5)
    assert (found.t_s, found.flag) == (3.5, flag) and found.meaning and found.text.isprintable()
    assert "pid=" not in found.text and "05:59" not in found.text


def test_usual_lines_of_a_load_are_no_reason_for_a_flag() -> None:
    usual = """(APIServer pid=3) INFO 11-26 05:57:16 [loggers.py:335] Engine 000: Avg prompt throughput: 0.5 tokens/s, Running: 1 reqs
(APIServer pid=3) INFO 11-26 05:57:16 [metrics.py:103] KV Transfer metrics: receive transfers=9, receive failures=0, receive MB=9.142
(EngineCore pid=9) INFO 11-26 05:57:10 [receiver.py:187] prefill worker 127.0.0.1:14599 is connected
(APIServer pid=3) WARNING 11-26 05:57:10 [x.py:1] an error rate of 0 is assumed
INFO:     127.0.0.1:5000 - "POST /v1/completions HTTP/1.1" 200 OK
"""
    assert lines_of_load(usual, 1.0) == []
    traceback = f"{ENGINE}Invocation failed\n{ENGINE}Traceback (most recent call last):\n{ENGINE}  File 'a'\n{ENGINE}KeyError: 'x'\n"
    assert [line.text for line in lines_of_load(traceback, 1.0)] == ["Invocation failed", "KeyError: 'x'"]


def test_lines_are_kept_with_the_instants_at_which_they_were_read(tmp_path: Path) -> None:
    (log := tmp_path / "single-0.log").write_text(f"{ENGINE}first\n")
    watch, later = LogWatch(log), LogWatch(log, from_now=True)
    begin_s = time.monotonic()
    assert [line.text for line in watch.lines()] == ["first"] and later.lines() == []
    middle_s = time.monotonic()
    with log.open("a") as file:
        file.write(f"{ENGINE}second\n{ENGINE}half")
    watch.look()
    first, second = watch.lines()
    assert begin_s <= first.t_s <= middle_s <= second.t_s <= time.monotonic()
    assert [line.text for line in later.lines()] == [second.text] == ["second"]
