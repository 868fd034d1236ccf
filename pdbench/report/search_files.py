"""search.json: written, read, and several of them as one answer."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pdbench import documents
from pdbench.analysis.compare import check_alike
from pdbench.analysis.run_analysis import load_analysis
from pdbench.errors import NOT_JSON, UserError
from pdbench.files import holds, write_whole
from pdbench.report import tables, text
from pdbench.search.document import FILE, Document

JOINED = "joined"
"""The command's key of an answer that was put together."""


def is_search(folder: Path) -> bool:
    return holds(folder, FILE)


def save(document: Document, out: Path) -> None:
    write_whole(out / FILE, documents.encode(document, seal=True))


def load(folder: Path) -> Document:
    """Raises UserError where the saved answer cannot be read or was edited, FileNotFoundError where there is none."""
    try:
        content = (folder / FILE).read_bytes()
        found = msgspec.json.decode(content, type=Document)
    except FileNotFoundError:
        raise
    except (OSError, *NOT_JSON) as error:  # to begin again would delete the loads that it names
        raise UserError(f"{folder / FILE} cannot be read ({error}): move it away, or give another --out") from None
    if documents.is_edited(content):
        raise UserError(
            f"{folder / FILE} was edited after it was saved: restore it, or search again with another --out"
        )
    return found


def check_no_measured_search(out: Path) -> None:
    """Raises UserError where `pdbench search` keeps its loads, by a document of the same name."""
    try:
        found = msgspec.json.decode((out / FILE).read_bytes(), type=Document)
    except (OSError, *NOT_JSON):
        return
    if JOINED not in found.command:
        raise UserError(
            f"{out} holds what `pdbench search` measured, and its {FILE} would be replaced: give another --out"
        )


def joined(folders: Sequence[Path], out: Path) -> tuple[Document, list[tables.Differing]]:
    """The answers of several searches with one SLO as one, whose runs stay where they are, to be presented in `out`; and what else differs
    between the first one's runs and another's.

    Raises UserError where one cannot be read, or they do not compare.
    """
    found: list[Document] = []
    for folder in folders:
        try:
            found.append(load(folder))
        except FileNotFoundError:
            raise UserError(f"{folder} holds no search: searches cannot be mixed with results folders") from None
    goals = [(each.slo, each.attain_pct) for each in found]
    if other := next((folder for folder, goal in zip(folders, goals, strict=True) if goal != goals[0]), None):
        raise UserError(f"{other} was searched within another SLO than {folders[0]}: report them apart")
    _name_apart(folders, found)
    names = [entry.name for each in found for entry in each.deployments]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice} was searched in several of these folders: give one of them")
    differing = _check_measured_alike(folders, found)
    for folder, each in zip(folders, found, strict=True):
        chosen = [choice for _name, tuned in each.tuned() for choice in (tuned, tuned.before)]
        closest = [entry.closest for entry in each.deployments]
        for named in (*each.points, *each.deployments, *closest, *chosen):
            if named and named.run:
                named.run = os.path.relpath(folder / named.run, out)
    document = Document(
        command={JOINED: [each.command for each in found]},
        slo=found[0].slo,
        attain_pct=found[0].attain_pct,
        deployments=[entry for each in found for entry in each.deployments],
        points=[point for each in found for point in each.points],
    )
    return document, differing


def _name_apart(folders: Sequence[Path], found: Sequence[Document]) -> None:
    """Deployments of one name but 2P2D and 3P1D are called so; servers given by their URL, all called "bench", by their folders."""
    entries = [(folder, each, entry) for folder, each in zip(folders, found, strict=True) for entry in each.deployments]
    names = text.told_apart(
        [entry.name for _folder, _each, entry in entries],
        [entry.layout for _folder, _each, entry in entries],
        [folder.resolve().name if entry.name == "bench" else entry.name for folder, _each, entry in entries],
    )
    for (_folder, each, entry), name in zip(entries, names, strict=True):
        entry.layout = None if name == entry.layout else entry.layout
        for point in each.points:
            point.deployment = name if point.deployment == entry.name else point.deployment
        entry.name = name


def _check_measured_alike(folders: Sequence[Path], found: Sequence[Document]) -> list[tables.Differing]:
    """Raises UserError where the searches' first loads, which are alike in one search, had other requests, GPUs, hosts or models."""
    loaded = [(folder, each.points[0].run) for folder, each in zip(folders, found, strict=True) if each.points]
    analyses = [load_analysis(folder / run) for folder, run in loaded]
    return [
        (loaded[0][0], folder, each)
        for (folder, _run), analysis in zip(loaded[1:], analyses[1:], strict=True)
        for each in check_alike((loaded[0][0], analyses[0]), (folder, analysis))
    ]
