"""The checker catches planted faults: a contract test that cannot fail proves nothing."""

from __future__ import annotations

import pytest
from faults import FAULTS, OPS
from hypothesis import Phase
from oracle import failures
from test_contract import on_cases


class Caught(Exception):
    """A case on which the faulty variant was noticed."""


@pytest.mark.parametrize(("name", "label", "fault"), FAULTS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_planted_fault_is_caught(name, label, fault):
    def check(case):
        try:
            wrong = failures(OPS[name], case, fault)
        except (RuntimeError, IndexError) as error:  # E.g. an ignored target is no class.
            wrong = [str(error)]
        if wrong:
            raise Caught

    with pytest.raises(Caught):
        on_cases(OPS[name], check, 150, phases=(Phase.generate,))


def test_every_op_has_planted_faults():
    assert {name for name, _, _ in FAULTS} == set(OPS)
