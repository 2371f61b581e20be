"""The rules of the house hold for every file, and each rule is able to fail."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import house
import pytest
from house import ROOT, RULES, Rule, sources

from fxopt.kernels.catalog import CATALOG
from fxopt.passes.base import Pass
from fxopt.passes.catalog import PASSES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    broken = [complaint for path in sources() for complaint in rule(path, (ROOT / path).read_text())]
    assert not broken, f"{(rule.__doc__ or '').strip()}\n" + "\n".join(broken)


BAD: list[tuple[Rule, str, str]] = [
    (house.import_law, "src/fxopt/ir/x.py", "from fxopt.passes.base import Pass"),
    (house.import_law, "src/fxopt/ir/x.py", "import fxopt.kernels.op"),
    (house.import_law, "src/fxopt/kernels/x.py", "from fxopt.ir import meta"),
    (house.import_law, "src/fxopt/kernels/rope/body.py", "from fxopt import ir"),
    (house.import_law, "src/fxopt/passes/x.py", "from fxopt.train.trainer import fit"),
    (house.import_law, "src/fxopt/runtime/x.py", "from fxopt.passes.base import Pass"),
    (house.import_law, "src/fxopt/runtime/x.py", "from fxopt.api import optimize"),
    (house.import_law, "src/fxopt/errors.py", "from fxopt.ir import meta"),
    (house.import_law, "src/fxopt/api.py", "from fxopt.cli import main"),
    (house.import_law, "src/fxopt/new_part.py", "from fxopt.ir import meta"),
    (house.import_law, "src/fxopt/passes/x.py", "from .base import Pass"),
    (house.import_law, "src/fxopt/data/x.py", "from fxopt.train.loader import Loader"),
    (house.import_law, "src/fxopt/passes/x.py", "from tests.zoo import models"),
    (house.import_law, "src/fxopt/studio/x.py", "from fxopt.ir.edit import Edit"),
    (house.short, "src/fxopt/ir/x.py", "x = 1\n" * 400),
    (house.named_for_what_it_is, "src/fxopt/ir/utils.py", ""),
    (house.named_for_what_it_is, "tests/helpers.py", ""),
    (house.no_hidden_code, "src/fxopt/ir/x.py", "exec('x = 1')"),
    (house.no_hidden_code, "tests/x.py", "eval('1')"),
    (house.no_hidden_code, "src/fxopt/ir/x.py", "import inspect\ninspect.getsource(len)"),
    (house.no_hidden_code, "bench/x.py", "try:\n    pass\nexcept:\n    pass"),
    (house.no_hidden_code, "src/fxopt/runtime/x.py", "import pickle"),
    (house.no_hidden_code, "src/fxopt/runtime/x.py", "from pickle import loads"),
    (house.no_architectures, "src/fxopt/passes/x.py", "class LlamaNorm: ..."),
    (house.no_architectures, "src/fxopt/ir/x.py", "if kind == 'gpt2': ..."),
    (house.no_architectures, "src/fxopt/kernels/x.py", "# as Qwen3 writes it"),
    (house.no_architectures, "src/fxopt/passes/x.py", "from transformers import T5Model, OlmoeModel"),
    (house.no_tolerances, "tests/x.py", "torch.allclose(a, b, atol=1e-6)"),
    (house.no_tolerances, "src/fxopt/passes/x.py", "torch.testing.assert_close(a, b, rtol=1e-3, atol=0)"),
    (house.no_tolerances, "tests/x.py", "assert a == pytest.approx(b, rel=1e-3)"),
    (house.no_tolerances, "bench/x.py", "torch.allclose(a, b, 1e-3)"),
    (house.no_tolerances, "src/fxopt/ir/x.py", "check(a, b, tol=0.1)"),
    (house.no_patching, "src/fxopt/passes/x.py", "import torch\ntorch.nn.Linear.forward = None"),
    (house.no_patching, "src/fxopt/passes/x.py", "from torch import nn\nsetattr(nn.Linear, 'forward', None)"),
    (house.no_patching, "src/fxopt/runtime/x.py", "import os\nos.environ['X'] = '1'"),
    (house.no_patching, "src/fxopt/runtime/x.py", "import transformers.masking_utils as masks\ndel masks.f"),
    (house.one_editor, "src/fxopt/passes/x.py", "node.replace_all_uses_with(other)"),
    (house.one_editor, "src/fxopt/passes/x.py", "graph.erase_node(node)"),
    (house.one_editor, "src/fxopt/ir/joint.py", "graph.call_function(f, ())"),
    (house.one_editor, "src/fxopt/passes/x.py", "node.args = ()"),
    (house.one_editor, "src/fxopt/runtime/x.py", "with graph.inserting_before(node): ..."),
    (house.imports_at_the_top, "src/fxopt/passes/x.py", "def f():\n    import torch"),
    (house.imports_at_the_top, "src/fxopt/kernels/rope/body.py", "def f():\n    def g():\n        from triton import jit"),
    (house.imports_at_the_top, "tests/x.py", "class T:\n    def f(self):\n        import torch"),
    (house.imports_at_the_top, "src/fxopt/passes/x.py", "def f():\n    importlib.import_module('torch')"),
    (house.private_torch_in_one_place, "src/fxopt/ir/x.py", "from torch.utils import _pytree"),
    (house.private_torch_in_one_place, "src/fxopt/ir/x.py", "import torch._dynamo.config as c"),
    (house.private_torch_in_one_place, "src/fxopt/passes/x.py", "from torch.fx.experimental.proxy_tensor import make_fx"),
    (house.private_torch_in_one_place, "src/fxopt/runtime/x.py", "torch._C._set_grad_enabled(True)"),
    (house.private_torch_in_one_place, "src/fxopt/runtime/x.py", "torch._foreach_mul(a, 2)"),
    (house.hypothesis_in_tests, "src/fxopt/kernels/rope/body.py", "from hypothesis import given"),
    (house.hypothesis_in_tests, "bench/x.py", "import hypothesis.strategies"),
    (house.no_machine, "src/fxopt/x.py", "path = '/" + "home/me/x'"),
    (house.portable_kernels, "src/fxopt/kernels/rope/body.py", "import triton"),
    (house.portable_kernels, "src/fxopt/passes/x.py", "import triton.language as tl"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "from triton.language.extra import libdevice"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "p = tl.make_block_ptr(x)"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "x = tl.multiple_of(x, 16)"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "@triton.autotune(configs=[])\ndef f(): ..."),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "kernel[(1,)](x)"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "n = x.sum().item()"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "for i in range(3):\n    acc = tl.dot(a, b, acc)\n    acc = tl.dot(c, d, acc)"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "for i in range(3):\n    acc += tl.dot(a, b)\n    acc += tl.dot(c, d)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text)


GOOD: list[tuple[Rule, str, str]] = [
    (house.import_law, "src/fxopt/passes/x.py", "import torch\nfrom fxopt.errors import PassError\nfrom fxopt.kernels.op import FusedOp"),
    (house.no_hidden_code, "src/fxopt/x.py", "model.eval()\nre.compile('x')\ntry:\n    pass\nexcept Exception:\n    pass"),
    (house.no_architectures, "src/fxopt/passes/x.py", "opt = clip(bits, phi)  # a time step"),
    (house.no_tolerances, "tests/x.py", "torch.allclose(a, b, rtol=0, atol=tolerance.X)\nabs(x)"),
    (house.no_patching, "src/fxopt/passes/x.py", "import torch\nx = torch.ones(3)\nx[0] = 1\nself.y = torch"),
    (house.one_editor, "src/fxopt/passes/x.py", "edit.replace(a, b)\nsuper().call_function(f, a, k)\nself.args = ()"),
    (house.imports_at_the_top, "src/fxopt/cli/dump.py", "def f():\n    import torch"),
    (house.imports_at_the_top, "src/fxopt/kernels/rope/triton.py", "def f():\n    import triton"),
    (house.hypothesis_in_tests, "src/fxopt/kernels/rope/cases.py", "from hypothesis import strategies"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "import triton\nlaunch(kernel, (1,), x)\nfor i in range(3):\n    a = tl.dot(x, y, a)\n    b += tl.dot(x, y)"),
    (house.portable_kernels, "src/fxopt/kernels/rope/triton.py", "for i in range(3):\n    if F:\n        a = tl.dot(x, y, a)\n    else:\n        a = tl.dot(y, x, a)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_can_pass(rule: Rule, path: str, text: str) -> None:
    assert rule(path, text) == []


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


def test_the_rules_see_the_files() -> None:
    found = sources()
    assert "src/fxopt/ir/edit.py" in found and "tests/test_house.py" in found and len(found) > 50


# -- passes and ops --------------------------------------------------------------------------------------------------


def pass_classes() -> list[type[Pass]]:
    """Every Pass defined in a file of passes/."""
    found = []
    for file in sorted((ROOT / "src/fxopt/passes").glob("*.py")):
        module = importlib.import_module(f"fxopt.passes.{file.stem}")
        found += [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, Pass) and cls is not Pass and cls.__module__ == module.__name__]
    return found


def incomplete(cls: type[Pass], tests: Path, rows: str) -> list[str]:
    """What a pass lacks."""
    label = (cls.__doc__ or "").splitlines()[0].strip() if cls.__doc__ else ""
    found = []
    if not label or label.startswith(f"{cls.__name__}("):
        found.append("a docstring whose first line is its label")
    if not (tests / f"test_{cls.name}.py").is_file():
        found.append(f"tests/passes/test_{cls.name}.py")
    if not re.search(rf"^\| `{cls.name}[`(]", rows, re.MULTILINE):
        found.append("a row in docs/passes.md")
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        found.append("@dataclass(frozen=True)")
    return found


def test_every_pass_is_in_the_catalog() -> None:
    assert set(pass_classes()) == set(PASSES)
    names = [cls.name for cls in PASSES]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_passes_are_complete(cls: type[Pass]) -> None:
    assert incomplete(cls, ROOT / "tests/passes", (ROOT / "docs/passes.md").read_text()) == []


def test_an_incomplete_pass_is_seen(tmp_path: Path) -> None:
    class Nothing(PASSES[0]):  # type: ignore[misc, valid-type]
        name = "nothing"

    Nothing.__doc__ = None
    assert len(incomplete(Nothing, tmp_path, "")) == 3


def missing_files(folder: Path) -> list[str]:
    """What an op's folder lacks. cuda.py instead of triton.py: torch's own kernels, which need no huge calls to check their offsets."""
    foreign = (folder / "cuda.py").is_file()
    missing = [name for name in ("__init__.py", "reference.py", "body.py", "cuda.py" if foreign else "triton.py", "cases.py") if not (folder / name).is_file()]
    cases = folder / "cases.py"
    defined = {node.name for node in ast.parse(cases.read_text()).body if isinstance(node, ast.FunctionDef)} if cases.is_file() else set()
    return missing + [f"cases.{name}()" for name in ("cases", "rows", *(() if foreign else ("huge",))) if name not in defined]


def op_folders() -> list[Path]:
    """The folders of kernels/, one per op; `formats` is no op."""
    return sorted(path for path in (ROOT / "src/fxopt/kernels").iterdir() if path.is_dir() and path.name not in ("__pycache__", "formats"))


def test_op_folders_are_complete() -> None:
    assert {folder.name: missing for folder in op_folders() if (missing := missing_files(folder))} == {}


def test_every_op_is_in_the_catalog() -> None:
    assert sorted(op.folder.rsplit(".", 1)[-1] for op in CATALOG) == [folder.name for folder in op_folders()]


def test_an_incomplete_op_is_seen(tmp_path: Path) -> None:
    (tmp_path / "reference.py").touch()
    (tmp_path / "cases.py").write_text("def rows(): ...")
    assert missing_files(tmp_path) == ["__init__.py", "body.py", "triton.py", "cases.cases()", "cases.huge()"]
    (tmp_path / "cuda.py").touch()
    assert missing_files(tmp_path) == ["__init__.py", "body.py", "cases.cases()"]


def test_every_operator_has_a_kernel() -> None:
    assert [kernel.name for op in CATALOG for kernel in op.kernels if kernel.cuda is None] == []


def test_code_in_the_readme_is_python() -> None:
    """`test_docs.py` runs it; this only sees that there is some."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        ast.parse(block)
    assert blocks, "the README shows no code"
