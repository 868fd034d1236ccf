"""Energy as tables: where each role's joules went, and what a token, a request and a joule came to; unmeasured ones say why.

Try: pdbench report single_results disaggregated_results && less report/report.md
"""

from collections.abc import Sequence
from typing import Any

from pdbench.report.curves import ROLE_ORDER
from pdbench.report.language import say
from pdbench.report.rows import Rows, figure

PARTS = ("active", "idle", "waiting")
ALWAYS = ("j_per_computed_prompt_token", "j_per_output_token", "decode_j_per_output_token")
FIGURES = (
    *(("attribution", name) for name in (*ALWAYS, "j_per_request")),
    ("efficiency", "output_tokens_per_j"),
    ("efficiency", "energy_delay_js"),
    ("efficiency", "goodput_per_w"),
    ("handoff", "bytes"),
    ("handoff", "active_j"),
    ("efficiency", "price_per_million_output_tokens"),
    ("efficiency", "gco2_per_million_output_tokens"),
)


def parts_j(role: dict[str, Any]) -> dict[str, float]:
    """A role's total in three: `active` above idle in its phase, `idle` draw meanwhile, `waiting` with no request in its phase.

    A role without a phase of its own has no `waiting`; without a measured idle power its phase is not split.
    """
    phase = role.get("phase")
    if phase is None:
        found = {"active": role["active_j"], "idle": role["idle_j"]}
    else:
        found = {"active": phase["active_j"], "idle": phase["idle_j"], "waiting": role["waiting_j"]}
        if phase["active_j"] is None:
            found["active"] = phase["energy_j"]
    known = {name: float(joules) for name, joules in found.items() if joules is not None}
    return known or ({} if role["total_j"] is None else {"active": role["total_j"]})


def roles_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each role's energy as `attribution.RoleEnergy`, prefill first; empty where no GPU was sampled."""
    roles = summary.get("attribution", {}).get("roles", {})
    return dict(sorted(roles.items(), key=lambda item: ROLE_ORDER.get(item[0], 2)))


def both(summaries: Sequence[dict[str, Any]], names: Sequence[str], language: str = "en") -> list[Rows]:
    """The two tables; the first only where a role's energy was measured."""
    roles = role_rows(summaries, names, language)
    return [*([roles] if roles.rows else []), figure_rows(summaries, names, language)]


def role_rows(summaries: Sequence[dict[str, Any]], names: Sequence[str], language: str = "en") -> Rows:
    """A row a role: its joules in the measured windows, in three parts, and for how long it waited."""
    rows = []
    for summary, name in zip(summaries, names, strict=True):
        for role, one in roles_of(summary).items():
            parts = parts_j(one)
            waited = "" if one["waiting_s"] is None else f"{figure(one['waiting_s'])} / {figure(one['window_s'])}"
            joules = [figure(parts[part]) if part in parts else "" for part in PARTS]
            label = role if role == name else f"{name}, {role}" if len(names) > 1 else role
            rows.append([label, figure(one["total_j"]), *joules, waited])
    header = ["role", "total_j", *(f"{part}_j" for part in PARTS), "waiting_s"]
    return Rows(say("energy by role", language), [say(key, language) for key in header], rows, [""] * len(rows))


def figure_rows(summaries: Sequence[dict[str, Any]], names: Sequence[str], language: str = "en") -> Rows:
    """A row a figure, a column a run; what was not measured says so, and the note says why."""
    rows = []
    for section, key in FIGURES:
        values = [_value(summary, section, key) for summary in summaries]
        if key in ALWAYS or any(value is not None for value in values):
            label = say(key if section != "handoff" else f"handoff_{key}", language)
            rows.append([label, *(say("not measured", language) if v is None else figure(v) for v in values)])
    why = {name: reason for summary, name in zip(summaries, names, strict=True) if (reason := why_not(summary))}
    note = "; ".join(f"{name}: {reason}" for name, reason in why.items())
    note = f"{say('not measured', language)}: {note}" if note else ""
    return Rows(say("energy figures", language), ["", *names], rows, [""] * len(rows), (0,), note)


def why_not(summary: dict[str, Any]) -> str | None:
    """Why energy, or its split by phase, was not measured; None when it was."""
    reason: str | None = summary["energy"].get("not_measured") or summary.get("attribution", {}).get("why_no_split")
    return reason


def _value(summary: dict[str, Any], section: str, key: str) -> float | None:
    if section == "handoff":
        held = summary.get("attribution", {}).get("handoff") or {}
        return None if held.get(key) is None else held[key] / (1e9 if key == "bytes" else 1)
    found = summary.get(section, {}).get(key)
    return summary["energy"].get(key) if found is None else found
