"""The planted faults fit the present source; `python -m tests.faults` tries them."""

from __future__ import annotations

from pathlib import Path

import pytest

import slm_plugin
from tests.faults import Fault, families, others, pruners

PACKAGE, TESTS = Path(slm_plugin.__file__).parent, Path(__file__).parents[1]


@pytest.mark.parametrize(
    "fault",
    (*pruners.FAULTS, *others.FAULTS, *families.FAULTS),
    ids=lambda fault: f"{fault.file}: {fault.name}",
)
def test_a_fault_has_its_place(fault: Fault) -> None:
    """The text that a fault replaces stands in its file once; otherwise adapt the fault."""
    text = (PACKAGE / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.original) == 1
    assert fault.faulty != fault.original
    compile(text.replace(fault.original, fault.faulty), fault.file, "exec")
    assert all((TESTS / module).is_file() for module in fault.tests.split())
