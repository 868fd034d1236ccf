"""A load's progress in the terminal: a small table or, where there is no terminal, a line every ten seconds."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner

from pdbench.analysis.metrics import spread, timings_of_requests
from pdbench.live import publisher
from pdbench.live.monitor import live_table
from pdbench.load.generator import OnProgress, Progress
from pdbench.records import DeviceRecord, RequestRecord
from pdbench.report.tables import Terminal

LINE_EVERY_S = 10.0
_TABLE_EVERY_S = 1.0
_LATEST = 50
"""Latencies are those of so many requests that ended last: few, because the client may be a thread of this process."""


@contextmanager
def progress(title: str, console: Console, devices: Callable[[], Sequence[DeviceRecord]]) -> Iterator[OnProgress]:
    """What the block calls with its load's progress; shown here and told to the viewer. `devices()`: their last samples."""
    seen: deque[tuple[float, Progress]] = deque(maxlen=20)
    requests: deque[RequestRecord] = deque(maxlen=_LATEST)
    ended, begin_s = threading.Event(), time.monotonic()

    def on_progress(progress: Progress) -> None:
        seen.append((time.monotonic(), progress))
        requests.extend(progress.ended)
        publisher.put(progress)

    def line() -> str:
        if not seen:
            return f"{title}: warm-up"
        _at_s, now = seen[-1]
        return f"{title}: {now.done} of {now.total or '?'} requests{''.join(_figures(list(seen), list(requests)))}"

    def show() -> None:
        while not ended.wait(_TABLE_EVERY_S if console.is_terminal else LINE_EVERY_S):
            if console.is_terminal:
                spinner.update(text=line())
                live.update(Group(spinner, Terminal(live_table(devices()))) if devices() else spinner)
            else:
                console.print(f"  {line()}, {time.monotonic() - begin_s:.0f} s", soft_wrap=True)

    spinner = Spinner("dots", text=f"{title}: warm-up")
    live = Live(spinner, console=console, refresh_per_second=2, transient=True)
    thread = threading.Thread(target=show, daemon=True)
    with live if console.is_terminal and not console.quiet else nullcontext():
        if not console.quiet:
            thread.start()
        try:
            yield on_progress
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join()


def _figures(seen: Sequence[tuple[float, Progress]], requests: list[RequestRecord]) -> Iterator[str]:
    (first_s, first), (last_s, last) = seen[0], seen[-1]
    if last.in_flight:
        yield f", {last.in_flight} in flight"
    if last_s > first_s and last.tokens > first.tokens:
        yield f", {(last.tokens - first.tokens) / (last_s - first_s):,.0f} tokens/s"
    latencies = timings_of_requests(requests, {}).latencies if requests else {}
    for name, words in (("ttft", "TTFT"), ("mean_tbt", "mean TBT"), ("e2e", "E2E")):
        if name in latencies and (known := spread(latencies[name].rising)):
            yield f", {words} p50 {known.p50:{',.0f' if known.p50 >= 100 else '.3g'}} ms"
