"""That no known bug is without test and patch, and that no patch has gone stale. `make test-mutants` runs them."""

import shutil
from pathlib import Path

import pytest

from tests.mutants.run import ROOT, apply, description, known_patches, known_tests

BUGS = {f"r{number:02}" for number in range(1, 29)}
PRODUCT = ("core/", "graders/", "outbound/", "trainer/")


def test_every_known_bug_has_a_test_and_a_patch() -> None:
    assert known_tests().keys() == known_patches().keys() == BUGS


@pytest.mark.parametrize("patch", [patch for patches in known_patches().values() for patch in patches], ids=lambda patch: patch.stem)
def test_a_patch_says_what_it_does_and_still_applies(patch: Path, tmp_path: Path) -> None:
    assert description(patch).endswith(".")
    changed = [line.removeprefix("+++ b/") for line in patch.read_text().splitlines() if line.startswith("+++ ")]
    assert changed
    assert all(name.startswith(PRODUCT) for name in changed)
    for name in changed:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert apply(patch, tmp_path) == ""
    assert any((tmp_path / name).read_text() != (ROOT / name).read_text() for name in changed)
