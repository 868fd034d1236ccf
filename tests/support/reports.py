"""Pages and correctness checks for the tests of the report."""

from pdbench.analysis.compare import comparisons
from pdbench.records import Gate
from pdbench.report import tables
from pdbench.report.page import page


def gate(passed: bool, detail: str = "4 of 4 < 5") -> Gate:
    return Gate(passed=passed, prompts=4, equal_outputs=4, prompt_tokens=1, external_kv_tokens=1, detail=detail)


def page_of(analyses, names=None):
    names = names or [analysis.name for analysis in analyses]
    runs = dict(zip(names, analyses, strict=True))
    return page(runs, comparisons(runs), tables.side_by_side(runs))
