"""The rules of the house as functions: `rule(path, text) -> complaints`. `test_house.py` applies them to every file.

A path is relative to the repository, with forward slashes. A complaint is `path:line: what is wrong`.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "tests", "bench", "demo", "gate")
LINES = 400

# Which parts of fxopt a part may import.
_CORE = {"errors", "torch_private", "ir", "kernels"}
LAW: dict[str, set[str]] = {
    "errors": set(), "torch_private": set(), "ir": {"errors", "torch_private"}, "kernels": {"errors", "torch_private"}, "passes": _CORE, "runtime": _CORE, "data": set(), "train": _CORE | {"runtime", "data"},
    "dispatch": _CORE | {"passes", "runtime"}, "adapting": _CORE | {"passes", "runtime", "dispatch"},
    "certified": _CORE | {"passes", "runtime"}, "explain": _CORE | {"passes", "runtime"}, "view": _CORE | {"passes", "runtime", "explain"},
    "in_parts": _CORE | {"passes", "runtime", "dispatch", "certified", "explain"},
    "api": _CORE | {"passes", "runtime", "dispatch", "adapting", "certified", "explain", "in_parts"},
    "cli": _CORE | {"passes", "runtime", "data", "train", "dispatch", "api", "explain", "view", "in_parts"}, "studio": {"errors", "ir", "runtime"}, "__main__": {"cli"},
    "__init__": _CORE | {"passes", "runtime", "data", "train", "dispatch", "api"},
}

# Words that name a model type of transformers and also mean something else.
ENGLISH = set("""align aria audio bark beam big bit blip bloom bros canary canine chameleon chinese clap clip cohere conditional cosmos data decision
deformable depth diffusion dots donut doge edge embedding emu encoder falcon fast flex flint florence fun funnel git got granite grounding higgs informer
inkling janus laguna led long luke mask moonshine muse nougat opt perception phi pocket pop prompt radio rag recurrent reformer sam sapiens seamless
seed solar speech splinter step superglue switch table tapas time unlimited video vision visual whisper persimmon parakeet pegasus megatron perceiver
evolla moss instruct""".split())
ARCHITECTURES = {family for key in CONFIG_MAPPING_NAMES if len(family := re.match(r"[a-z]*", key.lower())[0]) > 2} - ENGLISH | {
    "llama", "qwen", "gemma", "mistral", "mixtral", "gpt", "bert", "resnet", "vit", "mamba", "deepseek", "rwkv"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

_GRAPH_EDITS = {"replace_all_uses_with", "erase_node", "create_node", "call_function", "call_method", "call_module", "node_copy", "graph_copy",
                "inserting_before", "inserting_after", "replace_input_with", "update_arg", "update_kwarg", "insert_arg", "eliminate_dead_code", "prepend"}
_NODE_FIELDS = {"args", "kwargs", "target", "op"}
_TOLERANCES = {"atol", "rtol", "tol", "tolerance", "rel", "abs"}
_CLOSE = {"allclose", "isclose", "assert_close", "approx", "assert_allclose"}
_PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}

Rule = Callable[[str, str], list[str]]


def part_of(path: str) -> str | None:
    """The part of fxopt a file belongs to: `ir`, `passes`, `cli`, ...; None outside src/fxopt."""
    found = re.match(r"src/fxopt/(\w+)", path)
    return found[1] if found else None


def _at(path: str, node: Any, what: str) -> str:
    return f"{path}:{getattr(node, 'lineno', 1)}: {what}"


@functools.cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import as (node, dotted name): `from a.b import c` gives `a.b.c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


def _root(node: ast.AST) -> ast.AST:
    """The name an attribute or subscript chain starts from."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


def import_law(path: str, text: str) -> list[str]:
    """A part imports only what is left of it; `ir` and `kernels` do not know each other; imports are absolute."""
    part = part_of(path)
    if part is None:
        return []
    found = []
    for node, name in _imports(_parsed(text)):
        if name.startswith("."):
            found.append(_at(path, node, "imports are absolute"))
        if name.split(".")[0] in ("tests", "bench", "demo"):
            found.append(_at(path, node, f"the library may not import {name.split('.')[0]}"))
        if not name.startswith("fxopt."):
            continue
        other = name.split(".")[1]
        allowed = LAW[part] | {part} if part in LAW else set()
        if other not in allowed and not (part != "errors" and other == "errors"):
            found.append(_at(path, node, f"{part} may not import {name}"))
        if part == "studio" and other == "ir" and not name.startswith("fxopt.ir.text"):
            found.append(_at(path, node, "studio may import only the text of programs"))
    return found


def short(path: str, text: str) -> list[str]:
    """Files have fewer than 400 lines."""
    lines = text.count("\n")
    return [f"{path}:{lines}: {lines} lines, at most {LINES - 1}"] if lines >= LINES else []


def named_for_what_it_is(path: str, text: str) -> list[str]:
    """No drawers for everything."""
    name = path.rsplit("/", 1)[-1]
    return [f"{path}:1: a file is named for what it holds"] if name in ("utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py") else []


def no_hidden_code(path: str, text: str) -> list[str]:
    """No exec, eval, compile, getsource; no pickle in the library; no bare except."""
    found = []
    tree = _parsed(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval", "compile", "__import__")
            if plain or _called(node) in ("getsource", "getsourcelines"):
                found.append(_at(path, node, f"{_called(node)} is not used here"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(_at(path, node, "a bare except hides interrupts: name what is caught"))
    if not path.startswith("tests/"):
        found += [_at(path, node, f"{name} can run code on load") for node, name in _imports(tree) if name.split(".")[0] in _PICKLES]
    return found


def no_architectures(path: str, text: str) -> list[str]:
    """Passes, ir and kernels know graphs, not models."""
    if part_of(path) not in ("passes", "ir", "kernels"):
        return []
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        found += [f"{path}:{number}: names the model {word}" for word in dict.fromkeys(_WORD.findall(line)) if word.lower() in ARCHITECTURES]
    return found


def _number(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool) and node.value != 0


def no_tolerances(path: str, text: str) -> list[str]:
    """The numbers that decide whether two results are close are in one file. Zero is no tolerance."""
    if path == "src/fxopt/kernels/tolerance.py":
        return []
    found = []
    for node in ast.walk(_parsed(text)):
        if not isinstance(node, ast.Call):
            continue
        close = _called(node) in _CLOSE
        for keyword in node.keywords:
            if keyword.arg in _TOLERANCES and (close or keyword.arg not in ("rel", "abs", "tolerance")) and _number(keyword.value):
                found.append(_at(path, node, f"a tolerance literal ({keyword.arg}): take it from kernels/tolerance.py"))
        if close and any(_number(arg) for arg in node.args[2:]):
            found.append(_at(path, node, "a tolerance literal: take it from kernels/tolerance.py"))
    return found


def no_patching(path: str, text: str) -> list[str]:
    """The library does not assign into modules and classes of other packages."""
    if part_of(path) is None or path == "src/fxopt/ir/torch_patches.py":
        return []
    tree = _parsed(text)
    foreign = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
               for alias in node.names if not (getattr(node, "module", None) or alias.name).startswith("fxopt")}
    found = []
    for node in ast.walk(tree):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            targets = list(node.targets)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.Call) and _called(node) in ("setattr", "delattr", "object.__setattr__") and node.args:
            targets = [ast.Attribute(node.args[0], "")]
        for target in targets:
            root = _root(target)
            if isinstance(target, (ast.Attribute, ast.Subscript)) and isinstance(root, ast.Name) and root.id in foreign:
                found.append(_at(path, node, f"assigns into {root.id}, which is not ours"))
    return found


def one_editor(path: str, text: str) -> list[str]:
    """Only ir/edit.py mutates an fx graph. (In `ir.capture` and `ir.copies` the graph is not a Program yet, in `ir.region_graph` no more.)"""
    if part_of(path) is None or path in ("src/fxopt/ir/edit.py", "src/fxopt/ir/capture.py", "src/fxopt/ir/copies.py",
                                         "src/fxopt/ir/region_graph.py"):
        return []
    found = []
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GRAPH_EDITS:
            own = isinstance(node.func.value, ast.Call) and _called(node.func.value) == "super"  # an fx.Interpreter's own method
            if not own:
                found.append(_at(path, node, f"{node.func.attr} edits a graph: that is done in ir/edit.py"))
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and target.attr in _NODE_FIELDS and not (isinstance(target.value, ast.Name) and target.value.id == "self"):
                    found.append(_at(path, node, f"assigns a node's {target.attr}: that is done in ir/edit.py"))
    return found


def imports_at_the_top(path: str, text: str) -> list[str]:
    """Nothing is imported inside a function, except by the command line, by what loads Triton or an optional package of data, and by the lazy public names."""
    if path.startswith("src/fxopt/cli/") or re.fullmatch(r"src/fxopt/kernels/\w+/triton\.py", path):
        return []
    found = []
    for function in ast.walk(_parsed(text)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += [_at(path, node, f"imports {name} inside a function") for node, name in _imports(function)]
            if part_of(path) is not None and path not in ("src/fxopt/__init__.py", "src/fxopt/kernels/op.py", "src/fxopt/data/extras.py"):
                found += [_at(path, node, "imports by name inside a function") for node in ast.walk(function)
                          if isinstance(node, ast.Call) and _called(node) == "import_module"]
    return found


def private_torch_in_one_place(path: str, text: str) -> list[str]:
    """Names of torch that it does not document are taken from torch_private.py, whose tests try each of them."""
    if part_of(path) is None or path in ("src/fxopt/torch_private.py", "src/fxopt/ir/torch_patches.py"):
        return []
    tree = _parsed(text)
    found = [_at(path, node, f"{name} is private: import it from fxopt.torch_private") for node, name in _imports(tree)
             if re.match(r"torch(\.\w+)*\._\w|torch\.fx\.experimental", name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith(("__", "_check")):
            chain, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id == "torch" and "ops" not in chain:
                found.append(_at(path, node, f"torch.{'.'.join(reversed(chain))} is private: take it from fxopt.torch_private"))
    return found


def hypothesis_in_tests(path: str, text: str) -> list[str]:
    """hypothesis is needed by tests and cases.py only."""
    if path.startswith("tests/") or path.endswith("/cases.py"):
        return []
    return [_at(path, node, "hypothesis is for tests and cases.py") for node, name in _imports(_parsed(text)) if name.split(".")[0] == "hypothesis"]


def no_machine(path: str, text: str) -> list[str]:
    """Nothing names the machine it was written on."""
    found = re.compile(r"(?<![\w.])/(?:" + "work|home|root|Users" + r")/\w")
    return [f"{path}:{number}: names a machine's path" for number, line in enumerate(text.splitlines(), 1) if found.search(line)]


_KERNELS = re.compile(r"src/fxopt/kernels/\w+/triton\.py")
# What an interpreter, a compile without a GPU or another release of Triton does not know, and hints that can lie.
_UNPORTABLE = {"libdevice", "extra", "make_block_ptr", "advance", "inline_asm_elementwise", "extern_elementwise", "autotune", "heuristics",
               "multiple_of", "max_contiguous", "max_constancy"}
_WAITS = {"item", "tolist", "cpu", "numpy", "synchronize"}


def portable_kernels(path: str, text: str) -> list[str]:
    """Triton is for kernels/*/triton.py, which start kernels through `launch`, read no tensor values, and use what runs everywhere."""
    found = []
    tree = _parsed(text)
    if part_of(path) is not None and not _KERNELS.fullmatch(path):
        return [_at(path, node, "triton is imported by kernels/*/triton.py only") for node, name in _imports(tree) if name.split(".")[0] == "triton"]
    if not _KERNELS.fullmatch(path):
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _UNPORTABLE or isinstance(node, ast.alias) and node.name.split(".")[-1] in _UNPORTABLE:
            found.append(_at(path, node, f"{node.attr if isinstance(node, ast.Attribute) else node.name} does not run everywhere"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            found.append(_at(path, node, "a kernel is started through fxopt.kernels.launch.launch"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _WAITS:
            found.append(_at(path, node, f"{node.func.attr} waits for the device"))
        if isinstance(node, (ast.For, ast.While)):
            found += [_at(path, node, f"two products into {name} in one turn of a loop: miscompiled on sm_103") for name, count in _products(node.body).items() if count > 1]
    return found


def _products(statements: list[ast.stmt]) -> Counter[str]:
    """How many tl.dot add to each name in one pass over statements; of two branches the one with more."""
    found: Counter[str] = Counter()
    for node in statements:
        if isinstance(node, ast.If):
            found += _products(node.body) | _products(node.orelse)
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.target if isinstance(node, ast.AugAssign) else None
            for call in ast.walk(node.value):
                if isinstance(call, ast.Call) and _called(call) == "dot":
                    held = call.args[2] if len(call.args) > 2 else next((keyword.value for keyword in call.keywords if keyword.arg == "acc"), target)
                    if isinstance(held, ast.Name):
                        found[held.id] += 1
    return found


RULES: tuple[Rule, ...] = (import_law, short, named_for_what_it_is, no_hidden_code, no_architectures, no_tolerances, no_patching, one_editor,
                           imports_at_the_top, private_torch_in_one_place, hypothesis_in_tests, no_machine, portable_kernels)


def sources() -> list[str]:
    """Every Python file of the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
