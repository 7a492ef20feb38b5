"""The task: sums of two numbers of one or two digits, made by reasoning-gym, split into rows to train on and rows never trained on.

`python -m examples.demo.prompts train.jsonl held_out.jsonl` writes the two files.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import reasoning_gym

from examples.demo.settings import NUM_HELD_OUT, NUM_TRAINING, SEED

DRAWS = 4000
"""The generator repeats itself: so many draws hold about 1,900 distinct questions."""

Row = dict[str, Any]


def make_rows() -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), distinct and disjoint by text."""
    dataset = reasoning_gym.create_dataset(
        "basic_arithmetic",
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=2,
        operators=["+"],
        allow_parentheses=False,
        allow_negation=False,
        seed=SEED,
        size=DRAWS,
    )
    distinct = {item["metadata"]["expression"]: item["answer"] for item in dataset}
    rows = [make_row(expression, answer) for expression, answer in distinct.items()]
    random.Random(SEED).shuffle(rows)
    held_out, training = rows[:NUM_HELD_OUT], rows[NUM_HELD_OUT : NUM_HELD_OUT + NUM_TRAINING]
    check_split(training, held_out)
    return training, held_out


def make_row(expression: str, answer: str) -> Row:
    question = f"What is {expression}? Answer with only the number."
    return {"messages": [{"role": "user", "content": question}], "answer": answer}


def text_of(row: Row) -> str:
    return str(row["messages"][-1]["content"])


def check_split(training: list[Row], held_out: list[Row]) -> None:
    """What makes the held-out reward worth printing."""
    trained, held = {text_of(row) for row in training}, {text_of(row) for row in held_out}
    assert len(held) == len(held_out) >= 64, "held-out rows must be distinct and at least 64"
    assert len(trained) == len(training) >= 1000, "training rows must be distinct and at least 1,000"
    assert not trained & held, "no held-out question may be trained on"


def as_jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


if __name__ == "__main__":
    for path, rows in zip(sys.argv[1:], make_rows(), strict=True):
        Path(path).write_bytes(as_jsonl(rows))
