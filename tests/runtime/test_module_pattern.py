"""Module patterns agree with the regular expressions that PEFT runs, and take linear time."""

import re
import time

from hypothesis import given
from hypothesis import strategies as st
import pytest

from fxopt.errors import DataError
from fxopt.runtime.module_pattern import ModulePatterns

PATHS = st.from_regex(r"[a-c0-2_]{1,3}(\.[a-c0-2_]{1,3}){0,4}", fullmatch=True)
ATOMS = st.sampled_from(["a", "b", "c", "0", "_", ".", r"\.", r"\d", "[0-2]", "[abc]", r"\w"])
TOKENS = st.tuples(ATOMS, st.sampled_from(["", "", "", "*", "+"])).map("".join)
KEYS = st.lists(TOKENS, min_size=1, max_size=5).map("".join)
ALTERNATIVES = st.lists(
    st.tuples(st.sampled_from(["", "^"]), KEYS, st.sampled_from(["", "$"])).map("".join), min_size=1, max_size=2
).map("|".join)


def peft(keys: dict[str, int], path: str) -> int:
    """What PEFT computes."""
    return next((value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", path)), -1)


@given(st.lists(ALTERNATIVES | PATHS.map(lambda path: "^" + re.escape(path)), max_size=3, unique=True), PATHS)
def test_agrees_with_peft(keys: list[str], path: str) -> None:
    values = {key: index for index, key in enumerate(keys)}
    assert ModulePatterns.of(values, field="rank_pattern", where="test").get(path, -1) == peft(values, path)


@given(PATHS)
def test_agrees_on_the_same_path(path: str) -> None:
    for key in (path, re.escape(path), "^" + path, path.rpartition(".")[2]):
        assert ModulePatterns.of({key: 7}, field="rank_pattern", where="test").get(path, -1) == 7


@pytest.mark.parametrize("key", ["", "(a|a)*b", "(a)", "a**", "a{3}", "(?=a)", "[", "[z-a]", "*a", r"\1", "a" * 513, "a||b"])
def test_refuses_other_expressions(key: str) -> None:
    with pytest.raises(DataError, match="simple module pattern"):
        ModulePatterns.of({key: 1}, field="rank_pattern", where="test")


def test_refuses_too_many() -> None:
    with pytest.raises(DataError, match="more than"):
        ModulePatterns.of({f"layers.{i}": 1 for i in range(300)}, field="rank_pattern", where="test")


def test_linear_time_on_what_backtracks() -> None:
    patterns = ModulePatterns.of({"a*" * 200 + "b": 1}, field="rank_pattern", where="test")
    start = time.perf_counter()
    assert patterns.get("a." + "a" * 400, 0) == 0
    assert time.perf_counter() - start < 2
