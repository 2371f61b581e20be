"""The page's data say what the program says, and the file around them is closed to everything outside."""

from __future__ import annotations

import json
import re

import pytest
from golden_models import program
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import DataError, FxoptError
from fxopt.ir import meta
from fxopt.view import page
from fxopt.view.data import data


def test_every_stage_has_the_program_s_nodes() -> None:
    found, model, call = program("lora(rank=2) | fuse", depth=1)
    said = data(found, model, call, predict="none")
    assert [stage["title"] for stage in said["stages"]] == ["as captured", *(record.text for record in found.log)]
    for stage, at in zip(said["stages"], reversed(list(found.history()))):
        ids = [first + i for first, many in zip(stage["nodes"][::2], stage["nodes"][1::2]) for i in range(many)]
        wanted = [node for node in at.nodes if node.op in ("placeholder", "call_function")]
        assert len(ids) == len(stage["keys"]) == len(stage["loose"])
        for id_, node in zip(ids, wanted, strict=True):
            row = said["rows"][id_]
            where = meta.provenance(node)
            name, target, *_ = (said["strings"][column] for column in row[:2])
            assert name == node.name and (target in str(node.target) or target in ("input", "getitem"))
            assert [said["strings"][row[4]], said["strings"][row[6]], said["strings"][row[8]]] == [where.path, where.source, ", ".join(where.passes)]
            read = [source.name for source in node.all_input_nodes if source.op != "get_attr"]
            assert [said["strings"][each] for each in row[9]] == read and len(row[10]) == len(node.all_input_nodes) - len(read)
    names = {said["strings"][row[1]] for row in said["rows"]}
    assert "fxopt.rms_norm.default" in names


def test_costs_and_saved_values() -> None:
    found, model, call = program("fuse | remat", depth=1)
    said = data(found, model, call, errors=True)
    strings, rows = said["strings"], said["rows"]
    flops = {strings[row[0]]: row[12] for row in rows if strings[row[1]].startswith("aten.linear")}
    assert next(row[11] for row in rows if strings[row[0]] == "linear") == 12 * 32 * 4
    assert flops["linear"] == 2 * 12 * 16 * 32 and all(flops.values())
    first, last = said["stages"][0], said["stages"][-1]
    assert sum(first["saved"].values()) > sum(last["saved"].values()) > 0 and first["predicted"]["peak"] > 0 and said["stages"][1]["saved"] is None
    assert 0 < max(last["error"].values()) < 1e-5 and said["verified"]


def test_equal_blocks_have_equal_keys() -> None:
    found, model, call = program("canonicalize")
    said = data(found, model, call, predict="none")
    stage = said["stages"][-1]
    ids = [first + i for first, many in zip(stage["nodes"][::2], stage["nodes"][1::2]) for i in range(many)]
    by_block: dict[str, list[int]] = {}
    for id_, key, loose in zip(ids, stage["keys"], stage["loose"]):
        path = said["strings"][said["rows"][id_][4]]
        if path.startswith("layers."):
            by_block.setdefault(".".join(path.split(".")[:2]), []).append((key, loose))  # type: ignore[arg-type]
    first, second, third = by_block.values()
    assert second == third and [loose for _, loose in first] == [loose for _, loose in second] and first != second  # type: ignore[misc]


def test_a_wrong_word_is_named() -> None:
    found, model, call = program("canonicalize", depth=1)
    with pytest.raises(FxoptError, match="predict is 'all'"):
        data(found, model, call, predict="all")


@settings(max_examples=25)
@given(st.text(max_size=40))
def test_no_text_ends_the_data(text: str) -> None:
    said = page.html({"text": f"</script><!--{text}-->", "other": "<!--SCRIPT--><!--DATA-->"})
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', said, re.DOTALL)
    assert inside is not None and json.loads(inside[1]) == {"text": f"</script><!--{text}-->", "other": "<!--SCRIPT--><!--DATA-->"}
    assert said.count("<script") == 2 and "http:" not in said and "https:" not in said


def test_a_file_that_cannot_be_written(tmp_path: object) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        page.write({}, f"{tmp_path}/none/graph.html")
