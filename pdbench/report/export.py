"""All requests as CSV: one row a request with its durations, phases and error; instants stay in the results' JSON.

Try: pdbench report single_results disaggregated_results && head report/requests.csv
"""

import csv
import io

import msgspec
import numpy as np

from pdbench.analysis.metrics import PHASES, Measured, measure
from pdbench.records import Run

COLUMNS = (
    "deployment", "id", "trial", "sent_s", "end_s", "ttft_ms", "mean_tbt_ms", "e2e_ms", "send_delay_ms",
    "prompt_tokens", "output_tokens", *(f"{name}_ms" for name in PHASES), "error", "finish_reason",
)  # fmt: skip


def requests_csv(run: Run, measured: Measured | None = None, header: bool = True) -> str:
    """The rows of a run's measured requests (warm-up left out); an empty cell is what was not measured."""
    one = measured or measure(run)
    numbers = [one.sent_s, one.end_s, one.ttft_ms, one.mean_tbt_ms, one.e2e_ms, one.send_delay_ms]
    numbers += [one.prompt_tokens, one.output_tokens, *(one.phase_ms[name] for name in PHASES)]
    columns = [
        [run.name] * len(one.requests),
        [request.id for request in one.requests],
        [str(request.trial) for request in one.requests],
        *map(_cells, np.round(np.array(numbers), 6)),
        [request.error.kind if request.error else "" for request in one.requests],
        [request.finish_reason or "" for request in one.requests],
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return out.getvalue()


def _cells(column: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> list[str]:
    """Decimals by msgspec, which writes them several times faster than `repr` does; NaN, its null, as an empty cell."""
    return msgspec.json.encode(column.tolist()).decode()[1:-1].replace("null", "").split(",") if len(column) else []
