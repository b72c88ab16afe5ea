"""The Markdown page of gpu_report.py, made from results.json."""

from report_plan import GROUPS, STAGES, UNPROVEN


def problems_of(result: dict) -> list[str]:
    """Sentences about what is wrong in a stage that ran."""
    checks = [x for x in result.get("found", []) if x["kind"] == "Check" and not x["passed"]]
    lines = [f"{c['name']}: {c['wrong']} ({_cell(c['value'])}, allowed is {_cell(c['limit'])})" for c in checks]
    return ([f"the stage failed: {result['why']}"] if result["status"] == "failed" else []) + lines


def page(report: dict) -> str:
    """The whole page. report: the content of results.json."""
    stages, facts, code = report["stages"], report["key"]["machine"], report["key"]["code"]
    ran = {s: stages[s.name] for s in STAGES if s.name in stages and stages[s.name]["status"] != "left out"}
    wrong = {stage: problems for stage, result in ran.items() if (problems := problems_of(result))}
    checks = [x for result in ran.values() for x in result.get("found", []) if x["kind"] == "Check"]
    lines = [f"# GPU report: {facts['device_name']}", ""]
    verdict = "Nothing is wrong" if not wrong else f"{len(wrong)} stages found something wrong"
    lines += [
        f"{verdict}: {sum(c['passed'] for c in checks)} of {len(checks)} checks passed, in {len(ran)} stages.",
        "",
    ]
    if report["key"]["tiny"]:
        lines += ["**Models were tiny (`--tiny`): this says nothing about speed and memory of the real model.**", ""]
    if wrong:
        lines += ["## Wrong", ""]
        lines += [f"- **{stage.group}/{stage.name}**: {line}" for stage, found in wrong.items() for line in found] + [
            ""
        ]
    lines += _machine(report, facts, code)
    for group, title in GROUPS.items():
        own = {stage: result for stage, result in ran.items() if stage.group == group}
        if own:
            lines += [f"## {title}", "", *_stages_table(own), *_tables(own), *_checks(own)]
    lines += _left_out(stages, ran)
    lines += ["## What remains unproven", ""]
    lines += [f"- {line}" for line in UNPROVEN]
    unproven = [stage for stage in STAGES if stage not in ran or stage in wrong]
    lines += [f"- {stage.group}/{stage.name}: that {stage.proves[0].lower()}{stage.proves[1:]}." for stage in unproven]
    return "\n".join(lines) + "\n"


def _machine(report, facts, code) -> list[str]:
    commit = code["commit"] or f"unknown, digest of the code {code['digest']}"
    changed = f", with changes (digest of the code {code['digest']})" if code["changed"] else ""
    rows = {
        "device": f"{max(facts['device_count'], 1)} x {facts['device_name']}",
        "memory": f"{facts['memory_gib']} GiB" if "memory_gib" in facts else None,
        "driver": facts["driver"],
        "torch built for": facts["torch_built_for"],
        "CPU": f"{facts['cpu']}, {facts['cores']} cores",
        "system": f"{facts['system']}, Python {facts['python']}",
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "commit": f"{commit}{changed}",
        "date": report.get("date"),
        "command": f"`{report['command']}`",
        "minutes": f"{report.get('minutes')} for the last command; all stages together "
        f"{sum(r.get('seconds') or 0 for r in report['stages'].values()) / 60:.1f}",
    }
    return _table([{"": name, " ": value} for name, value in rows.items() if value]) + [""]


def _stages_table(own) -> list[str]:
    rows = []
    for stage, result in own.items():
        checks = [x for x in result.get("found", []) if x["kind"] == "Check"]
        state = f"{sum(c['passed'] for c in checks)} of {len(checks)}" if checks else "–"
        seconds = result.get("seconds")
        wrong = "**yes**" if problems_of(result) else ""
        rows.append({"stage": stage.name, "proves that": stage.proves, "checks passed": state, "wrong": wrong})
        rows[-1] |= {"seconds": "–" if seconds is None else f"{seconds:g}"}
    return _table(rows) + [""]


def _tables(own) -> list[str]:
    lines, tables = [], {}
    for result in own.values():
        for row in result.get("found", []):
            if row["kind"] == "Row":
                tables.setdefault(row["table"], []).append(row["cells"])
    for title, rows in tables.items():
        lines += [f"### {title}", "", *_table(rows), ""]
    return lines


def _checks(own) -> list[str]:
    rows = []
    for stage, result in own.items():
        for check in (x for x in result.get("found", []) if x["kind"] == "Check"):
            cells = {"stage": stage.name, "check": check["name"], "found": check["value"], "allowed": check["limit"]}
            rows.append(cells | {"": "passed" if check["passed"] else "**wrong**"})
    rows.sort(key=lambda row: row[""] == "passed")
    return ["### Checks", "", *_table(rows), ""] if rows else []


def _left_out(stages, ran) -> list[str]:
    lines = []
    for stage in STAGES:
        if stage not in ran:
            why = stages[stage.name]["why"] if stage.name in stages else "it was not reached"
            lines.append(f"- {stage.group}/{stage.name}, because {why}")
    for stage, result in ran.items():
        for x in (x for x in result.get("found", []) if x["kind"] == "LeftOut"):
            lines.append(f"- {stage.group}/{stage.name}: {x['name']}, because {x['why']}")
    return ["## Left out", "", *lines, ""] if lines else []


def _cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())
    return text.replace("|", "\\|")


def _table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return lines + [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
