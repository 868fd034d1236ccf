"""`pdbench search --tune` over a scripted NVML and a server whose speed and power follow the clocks by a known law."""

import itertools
import json
import os
import struct
import time
from math import inf
from pathlib import Path

import msgspec

from pdbench.serving.deployment import INFO_FILE, DeploymentInfo, ServerInfo
from tests.support.fake_nvml import child, environment
from tests.support.processes import ROOT, run_pdbench
from tests.support.servers import SSE_HEAD, Peer, ScriptedServer, chunk, event, tokens

PREFILL, DECODE = [600, 1200, None], [600, 990, None]
PREFILL_S, GAP_S, TOKENS, RATE, REQUESTS = 0.050, 0.015, 4, 12.0, 30
TTFT_S = 0.124
"""Between what prefill takes at 1,200 MHz (0.083) and at 600 MHz (0.165)."""
LAW = (20.0, 400.0, 60.0)
LATE = """
from pdbench.load import self_check
self_check.SEND_DELAY_P99_MS = self_check.READ_DELAY_P99_MS = self_check.MERGED_READ_DELAY_P99_MS = 1e9
self_check.STALLED_SHARE = 1.0
"""
"""A busy machine's stalls refuse no load here: they say nothing of clocks."""


def share(clock: int | None) -> float:
    return (clock or 1980) / 1980


def joules(prefill: int | None, decode: int | None) -> float:
    """Of all requests, on both GPUs; infinite where the SLO is missed."""
    ttft_s, gaps_s = PREFILL_S / share(prefill), (TOKENS - 1) * GAP_S / share(decode)
    a, b, c = LAW
    watts = sum(a + b * share(clock) ** 2 + c / share(clock) for clock in (prefill, decode))
    return watts * (REQUESTS / RATE + ttft_s + gaps_s) if ttft_s <= TTFT_S else inf


def test_cheapest_clocks_are_those_of_the_law(nvml_library: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"

    def clock(gpu: int) -> int:
        data = state.read_bytes() if state.exists() else b""
        return struct.unpack_from("I", data, 20 + 4 * gpu)[0] if data else 0

    def answer(peer: Peer) -> bool:
        if peer.method == "GET":
            peer.respond({"data": [{"id": "m"}]})
            return True
        time.sleep(PREFILL_S / share(clock(0)))
        gap_s = GAP_S / share(clock(1))
        peer.write(SSE_HEAD)
        *streamed, used = (chunk(event(payload)) for payload in tokens(TOKENS))
        peer.write(*streamed[:-1], pause_s=gap_s)
        peer.write(streamed[-1] + used + chunk(event(b"[DONE]")) + chunk(b""))
        return True

    settings = {"gpus": "2", "state": str(state), "clock_power": " ".join(map(str, LAW))}
    with ScriptedServer(answer) as server:
        roles = [
            ServerInfo(name=role, role=role, url=server.url, gpus=[gpu])
            for gpu, role in enumerate(("prefill", "decode"))
        ]
        info = DeploymentInfo(name="bench", url=server.url, model_name="m", owner_pid=os.getpid(), servers=roles)
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / INFO_FILE).write_bytes(msgspec.json.encode(info))
        values = [",".join(str(clock) for clock in clocks if clock) for clocks in (PREFILL, DECODE)]
        command = ["search", "--url", server.url, "--log-dir", "logs", "--slo", f"ttft={1e3 * TTFT_S:g},tbt=61"]
        command += ["--attain", "50%", "--tune", f"prefill_clock={values[0]}", f"decode_clock={values[1]}"]
        command += ["--tune-at", f"{RATE:g}", "--requests", str(REQUESTS), "--output-tokens", str(TOKENS)]
        command += ["--arrival", "constant", "--warmup", "1", "--idle-s", "0", "--cooldown-s", "0"]
        scripted = environment(nvml_library, **settings)
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "sitecustomize.py").write_text(LATE)
        scripted["PYTHONPATH"] = f"{tmp_path / 'late'}:{ROOT}:{scripted['PYTHONPATH']}"
        done = run_pdbench(*command, cwd=tmp_path, timeout_s=200, **scripted)
        assert done.returncode == 0, done.stdout + done.stderr
        saved = json.loads((tmp_path / "search" / "search.json").read_text())
        tuned = saved["deployments"][0]["tuned"]
        found = (tuned["setting"]["prefill_clock"], tuned["setting"]["decode_clock"])
        costs = {pair: joules(*pair) for pair in itertools.product(PREFILL, DECODE)}
        best = min(costs, key=lambda pair: costs[pair])
        assert best == (1200, 990)
        steps = [
            abs(PREFILL.index(found[0]) - PREFILL.index(best[0])),
            abs(DECODE.index(found[1]) - DECODE.index(best[1])),
        ]
        assert max(steps) <= 1 and costs[found] < inf, (found, best)
        assert tuned["kept"] and tuned["attained_pct"] >= 50
        # Energies are those of the law, and the cheapest of those measured with the same arrivals is chosen.
        sent = [point for point in saved["points"] if "/clocks-" in point["run"]]
        kept = sorted((point for point in sent if point["kept"]), key=lambda point: point["j_per_good_request"])
        for point in kept:
            taken = point["j_per_good_request"] * point["attained_pct"] / 100 * REQUESTS
            assert abs(taken / costs[tuple(point["setting"].values())] - 1) < 0.35, point
        assert tuned["setting"] in [point["setting"] for point in kept[:3]]
        assert len({tuple(point["setting"].values()) for point in sent}) == len(sent)  # none is measured twice
        each, before = (run["j_per_good_request"] * run["attained_pct"] for run in (tuned, tuned["before"]))
        assert each < 0.9 * before
        assert (
            saved["sentence"].startswith("bench needs least energy at")
            and "at the clocks as they are" in saved["sentence"]
        )
        assert (tmp_path / "search" / "search-clocks.png").exists()
        assert saved["deployments"][0]["tuned"]["requests"] == REQUESTS
        # Clocks are given back.
        read = "from pdbench import nvml; print(nvml.sm_clock_mhz(0), nvml.sm_clock_mhz(1))"
        assert child(nvml_library, read, **settings).split() == ["1980", "1980"]
        # A search that was stopped before its last run sends that alone.
        sent, points = len(server.requests), saved["points"]
        del saved["checksum"]
        (tmp_path / "search" / "search.json").write_text(json.dumps(saved | {"points": points[:-1]}))
        again = run_pdbench(*command, cwd=tmp_path, timeout_s=120, **scripted)
        assert again.returncode == 0, again.stdout + again.stderr
        resumed = json.loads((tmp_path / "search" / "search.json").read_text())
        assert [point["run"] for point in resumed["points"]] == [point["run"] for point in points]
        assert REQUESTS <= len([peer for peer in server.requests[sent:] if peer.method == "POST"]) < 2 * REQUESTS
