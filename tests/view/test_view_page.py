"""The page in a real browser: what it shows, that it asks for nothing, keys, colours, small windows, and that it is fast at 5,000 nodes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from golden_models import program

from fxopt.view import page
from fxopt.view.data import data

NODES = 5000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    found, model, call = program("lora(rank=2) | fuse | remat", shared=True)
    return data(found, model, call, predict="none", errors=True)


@pytest.fixture(scope="module")
def address(said: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("view") / "graph.html"
    page.write(said, file)
    return file.as_uri()


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    """No test may make the page ask for anything but itself, or complain."""
    browser.requests.clear()
    browser.said.clear()
    browser.failed.clear()
    yield
    assert browser.said == [] and [url for url in browser.requests if not url.startswith(("file:", "about:"))] == []
    assert len({url.split("#")[0] for url in browser.requests if url.startswith("file:")}) <= 1


def texts(browser: Browser, selector: str) -> list[str]:
    """What the shown elements of a selector say."""
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.offsetParent !== null).map((e) => e.textContent)")


def test_both_sides_are_shown_with_what_differs(browser: Browser, address: str, said: dict[str, Any]) -> None:
    browser.open(address)
    assert texts(browser, "#model") == ["Stack"] and len(texts(browser, "#passes button")) == len(said["stages"]) + 1
    browser.run("[...document.querySelectorAll('#passes button')].find((e) => e.title === 'fuse').click()")
    assert texts(browser, ".times") == ["×3"] and texts(browser, ".block .name")[:2] == ["inputs", "layers.0 … 2"]
    assert any("rms_norm" in each for each in texts(browser, ".cell.b.fused")) and any("rsqrt" in each for each in texts(browser, ".cell.a.removed"))
    assert not texts(browser, ".cell.a.added") and not texts(browser, ".cell.b.removed")
    assert any("is also read by" in each and "golden_models.py:" in each for each in texts(browser, "#summary li"))
    browser.run("document.getElementById('only').click()")
    assert all("same" not in each for each in browser.run("[...document.querySelectorAll('.row')].map((e) => e.className)")) and texts(browser, ".cell.fused")


def test_the_rows_are_the_stage_s_nodes(browser: Browser, address: str, said: dict[str, Any]) -> None:
    browser.open(f"{address}#left=0&right=0")
    assert browser.run("stages.map((stage) => stage.nodes.length)") == [len(stage["keys"]) for stage in said["stages"]]
    shown = browser.run("view.shown.reduce((sum, span) => sum + span.sections.reduce((n, section) => n + section.rows.length, 0), 0)")
    assert shown == len(said["stages"][0]["keys"]), "a stage beside itself shows every node once"
    for left in range(len(said["stages"])):
        for right in range(len(said["stages"])):
            both = browser.run(f"(() => {{ const rows = compared(stages[{left}], stages[{right}]); const of = (s) => rows.filter((r) => r[s]).map((r) => r[s].at); return [of('a'), of('b')]; }})()")
            assert both == [list(range(len(said["stages"][side]["keys"]))) for side in (left, right)], "every node once, in its order"


def test_a_node_says_where_it_comes_from(browser: Browser, address: str) -> None:
    browser.open(f"{address}#left=2&right=3&at=3&node=silu_1")
    (detail,) = texts(browser, "#detail")
    assert "golden_models.py:" in detail and "gate = nn.functional.silu(self.gate(y))" in detail and "layers.1" in detail and "difference" in detail
    assert browser.run("document.querySelector('.pick select').selectedOptions[0].textContent") == "layers.1", "the block of the node is chosen among the equal ones"
    browser.run("[...document.querySelectorAll('#detail dd button')][0].click()")
    assert browser.run("location.hash").startswith("#left=2&right=3&at=3&node=getitem")


def test_it_can_be_used_with_keys_alone(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.key("]")
    browser.key("[")
    assert browser.run("[view.left, view.right]") == [len_minus(browser, 3), len_minus(browser, 2)]
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowUp"):
        browser.key(key)
    assert browser.run("document.activeElement.className").startswith("cell b")
    name = browser.run("document.activeElement.querySelector('.nm').textContent")
    browser.key("Enter")
    assert texts(browser, "#detail h2") == [name] and f"node={name}" in browser.run("location.hash")
    browser.key("Escape")
    assert texts(browser, "#detail") == []
    browser.key("/")
    for letter in "rms":
        browser.key(letter)
    assert browser.run("document.getElementById('find').value") == "rms" and texts(browser, "#hits button")
    browser.key("Tab")
    assert browser.run("document.activeElement !== document.body && document.activeElement.id !== 'find'")


def len_minus(browser: Browser, by: int) -> int:
    """Number of the stage that many before the end."""
    return int(browser.run("stages.length")) - by


# The least ratio of text to what is behind it, over all elements that show text of their own: WCAG 2.1 asks 4.5 of text this small (AA).
CONTRAST = """(() => {
  const channel = (v) => (v /= 255, v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  let worst = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    if (e.offsetParent === null || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    let up = e, back = parse(getComputedStyle(up).backgroundColor);
    while (back[3] === 0 && up.parentElement) { up = up.parentElement; back = parse(getComputedStyle(up).backgroundColor); }
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`];
  }
  return worst;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser: Browser, address: str, dark: bool) -> None:
    browser.open(f"{address}#left=0&right=3&at=3&node=silu_1", dark=dark)
    browser.run("find('a'); document.getElementById('overlay').value = 'bytes'; document.getElementById('overlay').dispatchEvent(new Event('change'))")
    seen = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (seen == "rgb(255, 255, 255)") != dark
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, where
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != seen
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, where


def test_a_small_window(browser: Browser, address: str) -> None:
    browser.open(f"{address}#left=0&right=3&at=3&node=silu_1", width=360, height=740)
    assert browser.run("document.documentElement.scrollWidth") == 360
    wide = browser.run("[...document.querySelectorAll('main *, aside *, header *')].filter((e) => e.offsetParent !== null && e.getBoundingClientRect().right > 361"
                       " && !e.closest('#passes')).map((e) => e.className)")
    assert wide == []
    top = browser.run("document.querySelector('.cell[aria-current]').getBoundingClientRect().bottom < document.getElementById('detail').getBoundingClientRect().top + 1")
    assert top, "the node is not behind its own description"


def test_overlays(browser: Browser, address: str) -> None:
    browser.open(address)
    assert browser.run("[...document.querySelectorAll('#overlay option')].map((e) => e.value)") == ["type", "bytes", "flops", "time", "dtype", "error"], "nothing was predicted"
    for overlay, shown in (("bytes", "KiB"), ("flops", "kF"), ("time", "µs"), ("dtype", "float32"), ("error", "e-")):
        browser.run(f"document.getElementById('overlay').value = '{overlay}'; document.getElementById('overlay').dispatchEvent(new Event('change'))")
        assert any(shown in each for each in texts(browser, ".cell .val")), overlay


def test_text_of_a_model_is_only_text(browser: Browser, said: dict[str, Any], tmp_path: Path) -> None:
    bad = copy.deepcopy(said)
    bad["model"] = "</script><img src=x onerror=alert(1)><style>*{display:none}</style>"
    bad["strings"] = [f"{each}<b>&amp;" if each.endswith(".py:34") else each for each in bad["strings"]]
    page.write(bad, tmp_path / "bad.html")
    browser.open((tmp_path / "bad.html").as_uri())
    assert texts(browser, "#model") == [bad["model"]] and browser.run("document.images.length") == 0


def test_the_policy_holds(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.run("document.addEventListener('securitypolicyviolation', (e) => (window.broken = (window.broken || 0) + 1)); 0")
    browser.run("(() => { const i = new Image(); i.src = 'https://example.invalid/x.png'; const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(i, s); })()")
    assert browser.run("new Promise((done) => setTimeout(() => done([window.broken >= 2, window.ran]), 50))") == [True, None]
    assert browser.failed == [("https://example.invalid/x.png", "csp")], "the browser itself refused the request"
    browser.said.clear()  # the complaints that were asked for
    browser.requests.clear()


def large(said: dict[str, Any]) -> dict[str, Any]:
    """Data of a model of 5,000 different nodes: the rows of a small one over and over, each under a name of its own."""
    big = copy.deepcopy(said)
    strings, rows, stages = big["strings"], [], []
    ids: dict[tuple[int, int], int] = {}
    names: dict[tuple[int, int], int] = {}

    def copied(id_: int, turn: int) -> int:
        if (id_, turn) not in ids:
            row = list(said["rows"][id_])
            for column, said_ in ((0, "{}_{}"), (4, "tower.{1}.{0}")):
                key = (row[column], turn + 100_000 * column)
                if key not in names:
                    names[key] = len(strings)
                    strings.append(said_.format(strings[row[column]], turn))
                row[column] = names[key]
            ids[id_, turn] = len(rows)
            rows.append(row)
        return ids[id_, turn]

    turns = -(-NODES // min(len(stage["keys"]) for stage in said["stages"]))
    for stage in said["stages"]:
        flat = [first + i for first, many in zip(stage["nodes"][::2], stage["nodes"][1::2]) for i in range(many)]
        every = [copied(id_, turn) for turn in range(turns) for id_ in flat]
        runs: list[int] = []
        for each in every:
            if runs and runs[-2] + runs[-1] == each:
                runs[-1] += 1
            else:
                runs += [each, 1]
        keys = list(range(len(every)))
        stages.append({**stage, "nodes": runs, "keys": keys, "loose": keys, "error": {}, "saved": {str(i): 64 for i in range(0, len(every), 3)}})
    return {**big, "rows": rows, "stages": stages}


def test_five_thousand_nodes(browser: Browser, said: dict[str, Any], tmp_path: Path) -> None:
    big = large(said)
    size = page.write(big, tmp_path / "big.html")
    assert min(len(stage["keys"]) for stage in big["stages"]) >= NODES and size < 3e6, size
    before = browser.busy()  # computing, not waiting: other tests run on the same cores
    browser.open((tmp_path / "big.html").as_uri())
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    spent = browser.busy()
    assert 0.05 < (spent - before if spent > before else spent) < 1.5
    for said_, many in (("silu", True), ("tower.9", True), ("golden_models.py linear", True), ("none such", False)):
        before = browser.busy()
        browser.run(f"find({json.dumps(said_)})")
        assert browser.busy() - before < 0.1, said_
        assert (browser.run("document.querySelectorAll('#hits button').length") > 0) == many
    before = browser.busy()
    browser.run("go(3, [...stages[3].byName.keys()].at(-3))")
    assert browser.busy() - before < 1.5 and texts(browser, "#detail h2")
