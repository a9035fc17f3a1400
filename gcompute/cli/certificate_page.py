"""The certificate as words and as one self-contained HTML page, from its plain values."""

import html
from typing import Any

from gcompute.cli.progress import duration

TITLES = {
    "trainer": "the trainer: loss, every gradient and the parameters after four optimizer steps",
    "explicit": "the functions: outputs and the gradient of every input",
}
# How tables write the collectives.
SHORT = {
    "all-reduce": "AR",
    "all-gather": "AG",
    "reduce-scatter": "RS",
    "all-to-all": "A2A",
    "collective-permute": "CP",
}
LEGEND = ", ".join(f"{short} {kind}" for kind, short in SHORT.items())
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd; --paper: #fff; --good: #18794e;
        --bad: #c1121f; --wash: #fdecec; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #9a9a9a; --line: #3a3a3a; --paper: #16181c; --good: #4cc38a; --bad: #ff6369;
          --wash: #3a1d1f; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; }
p.lead, .note { color: var(--soft); } p.lead { margin-top: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
thead th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--paper); }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { font-size: 13px; color: var(--soft); white-space: normal; }
td.verdict { font-weight: 600; white-space: nowrap; }
.equal td.verdict { color: var(--good); } .differs td.verdict, .reason { color: var(--bad); }
.refused td { color: var(--soft); } .differs td { background: var(--wash); }
summary { cursor: pointer; } details table { width: auto; margin: .4rem 0 .8rem 1rem; }
"""


def exact_text(row: dict[str, Any]) -> str:
    """The largest error of the exact comparisons: "bits" where every bit agrees, else a number."""
    checks = [check for check in row["checks"] if check["band"] is None and not _counts(check)]
    if not checks:
        return ""
    worst = max(checks, key=lambda check: float(check["error"]))
    return "0 (bits)" if worst["precision"] == "bits" and worst["passed"] else f"{float(worst['error']):.1e}"


def _counts(check: dict[str, Any]) -> bool:
    return check["quantity"] == "dropped choices" and check["passed"]


def ratio_text(row: dict[str, Any], precision: str) -> str:
    """The largest error / band of a precision, "" where it was not run."""
    ratios = [float(check["ratio"]) for check in row["checks"] if check["precision"] == precision]
    return f"{max(ratios):.2f}" if ratios else ""


def collectives_text(found: dict[str, dict[str, int]]) -> str:
    """By axes, in the words of `LEGEND`.

    >>> collectives_text({"fsdp": {"all-gather": 25, "all-reduce": 11}, "data": {"all-reduce": 1}})
    'fsdp AG 25, AR 11; data AR 1'
    """
    return "; ".join(
        f"{axes} " + ", ".join(f"{SHORT.get(kind, kind)} {count}" for kind, count in sorted(kinds.items()))
        for axes, kinds in found.items()
    )


def summary(result: dict[str, Any]) -> str:
    """One sentence with the counts."""
    counts = result["counts"]
    red = f"{counts['differs']} DIFFER" if counts["differs"] else "none differs"
    left = f", {result['left_out']} left out for want of devices" if result["left_out"] else ""
    return (
        f"{counts['equal']} rows equal one device, {red}, {counts['refused']} are refused as they must be{left}."
        f" JAX {result['versions']['jax']}, {result['devices']} fake CPU devices, {duration(result['seconds'])}."
    )


def _checks_table(checks: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("quantity", "in", "error", "band", "error / band", "limit", "worst"))
    lines = []
    for check in checks:
        numbers = (check["error"], check["band"], check["ratio"], check["limit"])
        error, band, ratio, limit = ("" if n is None else f"{float(n):.2e}" for n in numbers)
        ratio = "" if check["ratio"] is None else f"{float(check['ratio']):.2f}"
        cells = (check["quantity"], check["precision"], error, band, ratio, limit, check["where"])
        passed = "" if check["passed"] else ' class="differs"'
        lines.append(f"<tr{passed}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _row(row: dict[str, Any], with_ratios: bool) -> str:
    name = html.escape(row["name"])
    if row["checks"]:
        name = f"<details><summary>{name}</summary>{_checks_table(row['checks'])}</details>"
    places = row["collectives"]
    what = [html.escape(row["refusal"])] if row["refusal"] else []
    what += [
        f"<b>{html.escape(place)}</b> {html.escape(collectives_text(found) or 'none')}"
        for place, found in places.items()
    ]
    what += [f'<span class="reason">{html.escape(reason)}</span>' for reason in row["reasons"]]
    ratios = [ratio_text(row, precision) for precision in ("float32", "bfloat16")] if with_ratios else []
    numbers = "".join(f"<td>{cell}</td>" for cell in (exact_text(row), *ratios))
    compiled = "" if row["compilations"] is None else str(row["compilations"])
    return (
        f'<tr class="{row["verdict"]}"><td>{name}</td>{numbers}<td class="text">{"<br>".join(what)}</td>'
        f'<td>{compiled}</td><td class="verdict">{row["verdict"]}</td></tr>'
    )


def render(result: dict[str, Any]) -> str:
    """The page as one string."""
    sections = []
    for form, title in TITLES.items():
        rows = [row for row in result["rows"] if row["form"] == form]
        if not rows:
            continue
        trainer = form == "trainer"
        ratios = "<th>float32<br>error / band</th><th>bfloat16<br>error / band</th>" if trainer else ""
        head = f'<th>row</th><th>error</th>{ratios}<th class="text">collectives</th><th>compiled</th><th></th>'
        body = "".join(_row(row, trainer) for row in rows)
        sections.append(
            f"<h2>{html.escape(title[0].upper() + title[1:])}</h2>"
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    verdict = "differs" if result["counts"]["differs"] else "equal"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>gcompute certificate</title><style>{STYLE}</style></head><body>
<h1>Certificate</h1>
<p class="lead {verdict}">{html.escape(summary(result))}</p>
<p class="note">Each row is a program on a mesh of fake devices against a program for one device, by the textbook, that
shares no code with the library. <b>error</b>: the largest relative error of any array, in float64, or 0 where every bit
agrees. <b>error / band</b>: in float32 and bfloat16 an exact result is not to be had, so the error is set beside what
one device errs by when its batch is shuffled, cut into microbatches or its hidden units change places. A ratio near 1
is noise; a missing reduction or a dropped scale is far outside, and shows in float64 at once. <b>collectives</b>: how
many instructions of each kind the compiled program holds, by the mesh axes that they run along: {LEGEND}. Open a row
for all numbers.</p>
{"".join(sections)}
</body></html>
"""
