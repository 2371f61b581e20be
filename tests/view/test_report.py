"""The report of a run in a real browser: curves and samples are seen, in the light and in the dark, and nothing is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import Browser

from fxopt.errors import DataError
from fxopt.train.rate import RateCurve
from fxopt.train.samples import Samples, samples
from tests.train.small import batches, run


def test_the_report_is_seen(tmp_path: Path) -> None:
    modes: list[bool] = []

    def make(model: Any) -> dict[str, str]:
        modes.append(model.training)
        return {"<prompt>": f"said <b>{len(modes)}</b>\nin two lines"}

    val = batches(2, seed=1)
    plain, _ = run(val=val, epochs=3)
    result, _ = run(val=val, epochs=3, output_dir=tmp_path, checkpoints=False, callbacks=[Samples(make)])
    assert result.losses == plain.losses and modes == [False] * 3 and [row["step"] for row in samples(tmp_path)] == [6, 12, 18]
    RateCurve((1e-3, 1e-2, 1e-1), (2.0, 1.0, 9.0), (2.0, 1.5, 4.0), 1e-2).write(tmp_path)
    with Browser() as browser:
        for dark, width in ((False, 1280), (True, 380)):
            browser.open((tmp_path / "report.html").as_uri(), width=width, dark=dark)
            assert browser.run("document.querySelectorAll('svg path').length") >= 4
            assert browser.run("Math.min(...[...document.querySelectorAll('svg path')].map(path => path.getBoundingClientRect().width))") > 200
            clipped = "[...document.querySelectorAll('svg text')].filter(text => text.getBoundingClientRect().left < text.ownerSVGElement.getBoundingClientRect().left)"
            assert browser.run(f"{clipped}.length") == 0, "no label is cut off"
            assert browser.run("[...document.querySelectorAll('h2')].map(head => head.textContent).includes('samples')")
            assert browser.run("[...document.querySelectorAll('td')].some(cell => cell.textContent === 'said <b>3</b>\\nin two lines')")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
        browser.open((tmp_path / "rate.html").as_uri())
        assert browser.run("document.querySelectorAll('svg line').length") == 1 and browser.run("document.querySelectorAll('svg path').length") == 2
        assert not browser.said and all(url.startswith("file:") for url in browser.requests)
    with pytest.raises(DataError, match="texts by name"):
        run(val=batches(2), output_dir=tmp_path / "other", checkpoints=False, callbacks=[Samples(lambda model: "text")])  # type: ignore[arg-type, return-value]
