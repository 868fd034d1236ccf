"""Which figures of scripted streams each tool gets right: pdbench, `vllm bench serve`, AIPerf, GuideLLM, inference-perf.

Every case of tests/support/stream_cases.py is served over a real socket on its schedule, one request after another, to every
tool by its own command; each tool's own file of single requests is read. Judged are: success or failure, output tokens, TTFT
(within 15 ms) and mean TBT (within 10 % and 1 ms), where the truth is defined. A peer is installed into a virtual environment
under --peers; one that cannot be installed or run is said so in the table.
Try: python benchmarks/stream_conformance.py --peers ~/peers --out docs/results/streams       (about 15 minutes)
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import stream_tools
from stream_tools import Group, Seen

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.servers import Peer, ScriptedServer
from tests.support.stream_cases import CASES
from tests.support.streams import GAP_S, Case

TTFT_MS, TBT_MS, TBT_SHARE = 15.0, 1.0, 0.1
ALONE = ("floats", "strings", "negative", "absurdly big", "escapes and surrogates")
"""Cases that end the whole run of some tool: each is asked for by a command of its own."""
_NUMBER = re.compile(rb"case-(\d+)")


def groups() -> list[tuple[Group, list[int]]]:
    """The cases that one command of a tool can ask for, by their numbers."""
    found: dict[object, tuple[Group, list[int]]] = {}
    for number, case in enumerate(CASES):
        group = Group(case.chat, case.forced, case.max_tokens)
        found.setdefault((group, case.name if case.name in ALONE else ""), (group, []))[1].append(number)
    return list(found.values())


def serve(numbers: list[int], log: Path) -> None:
    """Answer each completion request with the case that its prompt names, else with the next one; log what was written."""
    left = iter(numbers)
    written = log.open("w")

    def answer(peer: Peer) -> bool:
        if peer.method == "GET":
            peer.respond({"object": "list", "data": [{"id": "scripted", "object": "model", "max_model_len": 4096}]})
            return True
        if not peer.path.endswith("/completions"):
            peer.respond({"error": {"message": "no such path"}}, b"404 Not Found")
            return True
        named = _NUMBER.search(peer.body)
        number = int(named[1]) if named else next(left, numbers[-1])
        try:
            return CASES[number].answer(peer)
        finally:
            read_s, *pieces_s = peer.written_s
            entry = {"case": number, "pieces_s": [at_s - read_s for at_s in pieces_s]}
            print(json.dumps(entry), file=written, flush=True)

    with ScriptedServer(answer) as server:
        print(server.url, flush=True)
        server.serve_forever()


@contextmanager
def served(numbers: list[int], log: Path) -> Iterator[str]:
    """A server process for these cases; its URL."""
    command = [sys.executable, __file__, "--serve", ",".join(map(str, numbers)), "--log", str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def judge(case: Case, seen: Seen | None, pieces_s: list[float]) -> str:
    """`right`, or which figures are wrong: `tokens 5: 6` is a truth of 5 and a figure of 6."""
    truth = case.truth
    if seen is None:
        return "no record"
    if truth.error is not None:
        return "right" if not seen.ok else "failure: a success"
    if not seen.ok:
        return "success: a failure"
    wrong = []
    if truth.tokens is not None and seen.tokens != truth.tokens:
        wrong.append(f"tokens {truth.tokens}: {shown(seen.tokens)}")
    if truth.first is not None:
        ttft_ms = pieces_s[truth.first] * 1e3
        if seen.ttft_ms is None or abs(seen.ttft_ms - ttft_ms) > TTFT_MS:
            wrong.append(f"TTFT {shown(ttft_ms)}: {shown(seen.ttft_ms)}")
    if truth.mean_tbt_ms is not None and truth.first is not None and truth.last is not None:
        tbt_ms = (
            truth.mean_tbt_ms / (GAP_S * (truth.last - truth.first)) * (pieces_s[truth.last] - pieces_s[truth.first])
        )
        if seen.tbt_ms is None or abs(seen.tbt_ms - tbt_ms) > TBT_MS + TBT_SHARE * tbt_ms:
            wrong.append(f"TBT {shown(tbt_ms)}: {shown(seen.tbt_ms)}")
    return "; ".join(wrong) or "right"


def shown(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def measure(tool: stream_tools.Tool, folder: Path) -> dict[int, str]:
    """A tool's verdict for every case."""
    verdicts = {}
    for place, (group, numbers) in enumerate(groups()):
        inside = folder / f"{tool.name.split()[0]}-{place}"
        inside.mkdir(parents=True)
        with served(numbers, inside / "served.jsonl") as url:
            try:
                seen = tool.run(url, group, numbers, inside)
            except RuntimeError as error:
                if len(numbers) > 1:
                    raise
                verdicts[numbers[0]] = f"ends the run: {str(error).strip().splitlines()[-1]}"
                continue
        log: dict[int, list[float]] = {}
        for line in (inside / "served.jsonl").read_text().splitlines():
            entry = json.loads(line)
            log.setdefault(entry["case"], entry["pieces_s"])
        for number in numbers:
            verdicts[number] = judge(CASES[number], seen.get(number), log.get(number, []))
    return verdicts


def table(verdicts: dict[str, dict[int, str]]) -> str:
    """The verdicts as Markdown: a row per tool, then a row per case."""
    names = list(verdicts)
    lines = [
        "| tool | cases right | success or failure wrong | tokens wrong | TTFT wrong | mean TBT wrong |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        cells = verdicts[name].values()
        counts = [sum(cell == "right" for cell in cells)]
        counts.append(sum(cell.startswith(("failure", "success", "no record")) for cell in cells))
        counts += [sum(f"{figure} " in cell for cell in cells) for figure in ("tokens", "TTFT", "TBT")]
        lines.append(
            f"| {name} | {' | '.join(f'{count} of {len(cells)}' if not i else str(count) for i, count in enumerate(counts))} |"
        )
    lines += ["", f"| case | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for number, case in enumerate(CASES):
        label = f"{case.group}: {case.name}".replace("|", "\\|")
        lines.append(f"| {label} | {' | '.join(verdicts[name].get(number, '-') for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    """Options, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, help="folder of the peers' virtual environments; default: a temporary one"
    )
    parser.add_argument(
        "--only", action="append", help="one tool by its name; may be repeated; the others' rows in --out stay"
    )
    parser.add_argument("--out", type=Path, help="folder for table.md and verdicts.json")
    parser.add_argument("--work", type=Path, help="folder for the tools' own files; default: a temporary one")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve([int(number) for number in options.serve.split(",")], options.log)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work, peers = options.work or Path(temporary) / "work", options.peers or Path(temporary) / "peers"
        verdicts, skipped = {}, {}
        for tool in stream_tools.tools(peers, Path(temporary)):
            if options.only and tool.key not in options.only:
                continue
            began_s = time.monotonic()
            try:
                tool.install()
                verdicts[tool.name] = measure(tool, work)
                print(f"{tool.name}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
            except (OSError, RuntimeError, subprocess.SubprocessError, ValueError, KeyError, StopIteration) as error:
                skipped[tool.key] = f"{type(error).__name__}: {error}"
                print(f"{tool.key}: skipped, {skipped[tool.key]}", file=sys.stderr)
        numbers = {case.name: number for number, case in enumerate(CASES)}
        saved = options.out and options.out / "verdicts.json"
        if options.only and saved and saved.exists():
            for name, cells in json.loads(saved.read_text()).items():
                verdicts.setdefault(name, {numbers[case]: cell for case, cell in cells.items() if case in numbers})
        verdicts = dict(sorted(verdicts.items(), key=lambda entry: (not entry[0].startswith("pdbench"), entry[0])))
        text = table(verdicts) + "".join(f"\n\n{name} was not measured: {why}" for name, why in skipped.items())
        print(text)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "table.md").write_text(text + "\n")
            document = {
                name: {CASES[number].name: cell for number, cell in cells.items()} for name, cells in verdicts.items()
            }
            saved.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
