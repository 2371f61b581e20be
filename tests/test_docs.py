"""Every ```python block in README.md and docs/ runs; the table of passes says what the code says."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT

from fxopt.passes.base import Pass, literal
from fxopt.passes.catalog import PASSES

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def program_of(text: str) -> str:
    """The blocks of a page as one program; each keeps its line numbers, so that an error points into the page."""
    program = ""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(1))
        program += "\n" * (line - program.count("\n")) + found[1]
    return program


@pytest.mark.parametrize("page", [page for page in FILES if _BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    program = program_of(page.read_text())
    script = tmp_path / page.with_suffix(".py").name
    script.write_text(program)
    # the pages are read at the root of the repository, where `demo` is importable
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{page.name} (line numbers are those of the page)\n{done.stderr}"


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_demo_in_the_readme_is_short() -> None:
    first = _BLOCK.search((ROOT / "README.md").read_text())
    assert first is not None and "quantize(nf4)" in first[1] and "fxopt.fit" in first[1]
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 15


def test_blocks_keep_their_lines() -> None:
    assert program_of("a\n```python\nx = 1\n```\n\n```text\nno\n```\n```python\ny = x\n```\n") == "\n\nx = 1\n\n\n\n\n\n\ny = x\n"


def row_of(cls: type[Pass]) -> str:
    """The first cells of a pass's row in docs/passes.md: text form with defaults, label, facts, promise."""
    arguments = ", ".join(field.name if field.default is dataclasses.MISSING else f"{field.name}={literal(field.default)}" for field in dataclasses.fields(cls))
    promise = cls.promise.values if cls.promise.bound is None else f"{cls.promise.values} ({cls.promise.bound})"
    cells = [f"`{cls.name}({arguments})`" if arguments else f"`{cls.name}`", (cls.__doc__ or "").splitlines()[0], ", ".join(sorted(cls.requires)),
             ", ".join(sorted(cls.establishes)), promise]
    return "| " + " | ".join(cell or "-" for cell in cells) + " |"


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_the_table_of_passes_is_true(cls: type[Pass]) -> None:
    assert row_of(cls) in (ROOT / "docs/passes.md").read_text(), f"docs/passes.md should hold this row:\n{row_of(cls)}"
