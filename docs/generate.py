"""Writes hyperparameters.md, configuration.md, a table of preflight.md and the end of metrics.md from the code: `python docs/generate.py`.

A test fails when they are out of date.
"""

import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from core.compatibility import RULES, Limit, Rule
from core.options import Options
from core.presets import PRESETS
from core.settings import Settings
from trainer.doctor import COOL_DOWN, RECOVERY
from trainer.doctor import RULES as DOCTOR_RULES
from trainer.history import EVALUATIONS, FIRST_STEPS, WINDOW
from trainer.tolerances import TOLERANCES

FOLDER = Path(__file__).parent
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
SETTINGS_HEADER = """# Configuration

Every installation-wide setting is an environment variable, read once per process. Generated from `core/settings.py`.

| variable | default | meaning |
| --- | --- | --- |
"""
TOLERANCES_BEGIN = "<!-- tolerances: written by docs/generate.py from trainer/tolerances.py -->"
TOLERANCES_END = "<!-- end of tolerances -->"
PROPERTIES = {
    "`sampler_agrees`, `padding_changes_nothing`": attrgetter("logprobs"),
    "`first_ratio_is_one`": attrgetter("first_ratio"),
    "`microbatches_change_nothing`": attrgetter("gradient"),
}
"""Which of the `Tolerances` bounds which properties."""
DOCTOR_HEADING = "## The run doctor"
DOCTOR_HEADER = f"""{DOCTOR_HEADING}

After each step plain rules read the metrics. One that is true becomes an event of level `warn` with the cause in its message and, in
`data`, `code` `run_doctor`, `rule`, `evidence` (the numbers, and the steps that they are from) and `advice`. A rule needs all of its
steps and all of its metrics: one bad step says nothing, and without a value model nothing is said of one. Numbers below are means over
the newest {WINDOW} steps unless they say otherwise; "the first steps" are the first {FIRST_STEPS}, evaluations the newest {EVALUATIONS}.
A rule that stays true is reported again after {COOL_DOWN} steps, or once it was false for {RECOVERY} steps. Nothing is changed and
nothing is stopped: the advice is yours to take. This table is generated from `trainer/doctor.py`.

| rule | when | cause | advice |
| --- | --- | --- | --- |
"""
HEADER = """# Hyperparameters

What `method.reinforcement.hyperparameters` takes. "auto" or nothing gives the default. An option that another one would
silence, or that contradicts it, is refused at submit with both names. Generated from `core/options.py`, `core/presets.py` and
`core/compatibility.py`.

| option | default | type | effect |
| --- | --- | --- | --- |
"""


def describe_type(schema: dict[str, Any]) -> str:
    """The type and range of one property of a JSON schema, in words."""
    if "anyOf" in schema:
        return " or ".join(describe_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([schema.get("type", ""), ", ".join(bounds)]).strip()


def allowed(rule: Rule | Limit) -> str:
    """What the table of compatibility asks of `other`, in a few words."""
    if isinstance(rule, Limit):
        return f"{'less than' if rule.is_strict else 'at most'} `{rule.other}`"
    values = rule.needs or rule.refuses
    words = " or ".join("left out" if value is None else f"`{value}`" for value in values)
    return f"`{rule.other}` {'must be' if rule.needs else 'must not be'} {words}"


def compatibility() -> list[str]:
    rows = ["", "## What goes together", "", "Anything else is refused at submit with both names (`incompatible_options`).", ""]
    rows += ["| option | only where | because it |", "| --- | --- | --- |"]
    for rule in RULES:
        values = "" if isinstance(rule, Limit) or not rule.values else " " + " or ".join(f"`{value}`" for value in rule.values)
        rows.append(f"| `{rule.option}`{values} | {allowed(rule)} | {rule.why} |")
    return rows


def hyperparameters() -> str:
    schema = Options.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | `{field.default}` | {describe_type(schema[name])} | {' '.join((field.description or '').split())} |"
        for name, field in Options.model_fields.items()
    ]
    presets = [
        "",
        "## Presets",
        "",
        "A preset only sets options; an explicit option overrides it.",
        "",
        "| algorithm | sets |",
        "| --- | --- |",
    ]
    presets += [
        f"| `{name}` | {', '.join(f'`{option}: {value}`' for option, value in options.items()) or 'the defaults'} |"
        for name, options in PRESETS.items()
    ]
    return HEADER + "\n".join([*rows, *presets, *compatibility()]).replace("`None`", "none").replace("||", "/") + "\n"


def configuration() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if isinstance(field.default, SecretStr) else field.default
        rows.append(f"| `HONE_{name.upper()}` | `{default}` | {' '.join((field.description or '').split())} |")
    return SETTINGS_HEADER + "\n".join(rows).replace("``", "empty") + "\n"


def preflight() -> str:
    """The page as it is, with the table of tolerances between its marks."""
    rows = ["| properties | precision | what is measured | at most |", "| --- | --- | --- | --- |"]
    for names, choose in PROPERTIES.items():
        for precision, tolerances in TOLERANCES.items():
            bound = choose(tolerances)
            rows.append(f"| {names} | `{precision}` | {bound.in_words} | {bound.allowed:g} |")
    before, mark, rest = (FOLDER / "preflight.md").read_text().partition(TOLERANCES_BEGIN)
    return before + mark + "\n".join(["", *rows, ""]) + TOLERANCES_END + rest.partition(TOLERANCES_END)[2]


def metrics() -> str:
    """What is written by hand, and the doctor's table after it."""
    by_hand = (FOLDER / "metrics.md").read_text().split(DOCTOR_HEADING)[0]
    rows = [f"| `{rule.name}` | {rule.when} | {rule.cause} | {rule.advice} |" for rule in DOCTOR_RULES]
    return by_hand + DOCTOR_HEADER + "\n".join(rows) + "\n"


def pages() -> dict[Path, str]:
    texts = {
        "hyperparameters.md": hyperparameters(),
        "configuration.md": configuration(),
        "preflight.md": preflight(),
        "metrics.md": metrics(),
    }
    return {FOLDER / name: text for name, text in texts.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        sys.stdout.write(f"wrote {path.name}\n")
