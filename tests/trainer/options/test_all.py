"""Every option has its row in the table: a test in this folder that names it, runs the loop and says what it does."""

import re
from pathlib import Path

from core.options import Options


def test_every_option_has_a_test_that_names_it() -> None:
    names = [name for path in Path(__file__).parent.glob("test_*.py") for name in re.findall(r"def test_option_(\w+)", path.read_text())]
    missing = [option for option in Options.model_fields if not any(f"_{option}_" in f"_{name}_" for name in names)]
    assert missing == []
