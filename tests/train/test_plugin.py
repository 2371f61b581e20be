"""A package may name a strategy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxopt.errors import DataError
from tests.train.small import run

SOURCE = '''
from fxopt.train.strategies.single import Single


class Counted(Single):
    name, backwards = "counted", 0

    def backward(self, model, loss, last):
        Counted.backwards += 1
        super().backward(model, loss, last)
'''


def test_an_entry_point_is_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting_strategy.py").write_text(SOURCE)
    folder = tmp_path / "counting_strategy-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-strategy\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[fxopt.strategies]\ncounted = counting_strategy:Counted\n")
    monkeypatch.syspath_prepend(tmp_path)
    result, _ = run(strategy="counted", accumulate=2)
    assert len(result.losses) == 3 and sys.modules["counting_strategy"].Counted.backwards == 6
    with pytest.raises(DataError, match="(?s)There is no strategy .*counted"):
        run(strategy="count")
