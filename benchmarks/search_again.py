"""What today's rules of `pdbench search` make of the loads that were saved, beside the answers that were saved with them.

    python benchmarks/search_again.py SEARCH_FOLDER...

A search sends its next load by what it made of those before, so other rules would have sent others; the loads themselves are what they are.
"""

import argparse
from dataclasses import replace
from math import inf
from pathlib import Path

import msgspec

from pdbench import failures, slo_search
from pdbench.analysis.metrics import timings_of
from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.records import load_run
from pdbench.report import search_files
from pdbench.search.document import Document
from pdbench.search.rates import Answer, Search
from pdbench.slo_loads import client_was_the_limit, outcome_of, settle_s


def answer_of(document: Document, folder: Path, load: LoadConfig, name: str) -> Answer | None:
    """Of a deployment; None without a load that counts."""
    points = [point for point in document.points if point.deployment == name and not point.setting]
    alone = next((point for point in points if point.rate_per_s is None), None)
    if alone is None:
        return None
    alone_s, first_rate = slo_search._pace(timings_of(load_run(folder / alone.run)))
    search = Search(1 - document.attain_pct / 100, load.rate or first_rate, slo_search._unit_arrivals(load))
    for point in points:
        if point.rate_per_s and Path(point.run).parent.name.startswith("load-"):
            run = load_run(folder / point.run)
            if not failures.void(run.flags, None, 0) and not client_was_the_limit(run, point):
                settled = point.load_s >= settle_s(load, alone_s)
                search.add(replace(outcome_of(timings_of(run), point.rate_per_s, point.held), settled=settled))
    return search.answer() if search.outcomes else None


def again(folder: Path) -> None:
    """Raises OSError or UserError for a folder that lacks the answer or its loads."""
    document = search_files.load(folder)
    if search_files.JOINED in document.command:
        raise UserError("several searches' answers in one, without their loads")
    load = msgspec.convert(document.command["options"][0]["load"], LoadConfig)
    for entry in document.searched():
        found = answer_of(document, folder, load, entry.name)
        if found:
            saved = Answer(entry.rate_per_s or 0.0, entry.low or 0.0, inf if entry.high is None else entry.high)
            print(f"{folder} {entry.name}: saved {shown(saved)}, again {shown(found)}")


def shown(answer: Answer) -> str:
    return f"{answer.rate:.4g} ({answer.low:.4g} to {answer.high:.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        try:
            again(folder)
        except (OSError, UserError) as error:
            raise SystemExit(f"{folder}: {error}: give whole folders of `pdbench search`") from None


if __name__ == "__main__":
    main()
