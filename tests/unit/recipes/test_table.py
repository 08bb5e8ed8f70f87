"""Every row of the table in docs/trainers.md is a case here, and every case has its row."""

import re
from pathlib import Path

from tests.unit.recipes import test_routers, test_slices, test_stages

PAGE = Path(__file__).parents[3] / "docs/trainers.md"


def rows_of(page: str) -> set[tuple[str, str]]:
    """Trainer and mode of each table row under a heading about trainers' settings."""
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    tables = [section for section in sections if section.startswith("Settings")]
    found = re.findall(r"^\| (.+?) \| (.+?) \|", "\n".join(tables), flags=re.MULTILINE)
    plain = {(trainer, mode.replace("`", "")) for trainer, mode in found}
    return plain - {("trainer", "mode")}


def test_the_table_and_the_cases_are_the_same() -> None:
    cases = {(case.trainer, case.mode) for case in test_slices.CASES}
    assert rows_of(PAGE.read_text()) == cases | test_stages.ROWS | test_routers.ROWS
