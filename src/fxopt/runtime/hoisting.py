"""Frozen regions at the beginning of a step, left out: what leaves them is kept for each sample."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from fxopt.ir import hoist
from fxopt.ir.edit import effectful
from fxopt.ir.facts import Hoist
from fxopt.ir.regions import ancestors, is_ref
from fxopt.ir.samples import Rows

if TYPE_CHECKING:
    from fxopt.runtime.binding import Binding

log = logging.getLogger("fxopt")
_SMALL = 1 << 12  # bytes: tensors that are compared whole, since buffers are also written with what they held (by a check)


class Memory:
    """Values of samples by key, up to a number of bytes; those not used for longest go first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.values: OrderedDict[str, tuple[torch.Tensor, ...]] = OrderedDict()

    def get(self, key: str, device: torch.device) -> tuple[torch.Tensor, ...] | None:
        """A sample's values, or None."""
        found = self.values.get(key)
        if found is not None:
            self.values.move_to_end(key)
        return found

    def put(self, key: str, values: tuple[torch.Tensor, ...]) -> None:
        """Keep a sample's values, if they fit at all."""
        size = sum(value.nbytes for value in values)
        if key in self.values or size > self.limit:
            return
        while self.held + size > self.limit:
            self.held -= sum(value.nbytes for value in self.values.popitem(last=False)[1])
        self.values[key] = values
        self.held += size

    def drop(self) -> None:
        """Forget all."""
        self.values.clear()
        self.held = 0


class Folder:
    """The same in safetensors files, one for each sample. Files of other runs with the same weights are found; times of use decide which go first."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        self.sizes: OrderedDict[str, int] = OrderedDict((file.stem, file.stat().st_size) for file in files)

    @property
    def held(self) -> int:
        """Bytes of the files."""
        return sum(self.sizes.values())

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str, device: torch.device) -> tuple[torch.Tensor, ...] | None:
        """A sample's values, or None."""
        if key not in self.sizes:
            return None
        file = self._file(key)
        if not file.is_file():  # another process dropped it
            del self.sizes[key]
            return None
        self.sizes.move_to_end(key)
        file.touch()
        found = load_file(file, device=str(device))
        return tuple(found[str(index)] for index in range(len(found)))

    def put(self, key: str, values: tuple[torch.Tensor, ...]) -> None:
        """Keep a sample's values, if they fit at all. A file appears whole or not at all."""
        size = sum(value.nbytes for value in values)
        if key in self.sizes or size > self.limit:
            return
        while self.sizes and self.held + size > self.limit:
            self._file(self.sizes.popitem(last=False)[0]).unlink(missing_ok=True)
        part = self._file(key).with_suffix(".part")
        save_file({str(index): value.contiguous() for index, value in enumerate(values)}, part)
        part.replace(self._file(key))
        self.sizes[key] = self._file(key).stat().st_size

    def drop(self) -> None:
        """Forget all of these weights' files."""
        for key in self.sizes:
            self._file(key).unlink(missing_ok=True)
        self.sizes.clear()


class Hoisting:
    """What a binding need not compute again.

    Attributes:
        skipped: numbers of the steps that are left out.
        values: names of what is kept, with the dimension that holds the samples and how many places of it each takes.
        why: what stands in the way, where nothing is left out.
        hits, misses: samples. dropped: how often changed weights made all of it void.
    """

    def __init__(self, binding: Binding, fact: Hoist) -> None:
        self.binding, self.fact = binding, fact
        self.hits = self.misses = self.dropped = self.bypassed = 0
        self.why = ""
        self.values: dict[str, Rows] = {}
        self.first: list[int] = []  # steps that are run for new samples
        self.given: list[tuple[int, bool]] = []  # inputs that matter: their number, and whether they hold samples
        self.skipped: frozenset[int] = frozenset()
        self._find()
        self.cells = [cell for at in self.first for cell in binding.steps[at][3]]
        self.versions: Any = None
        self.store: Memory | Folder | None = None

    # -- which -----------------------------------------------------------------------------------------------------

    def _find(self) -> None:
        program, steps = self.binding.program, self.binding.steps
        nodes = {node.name: node for node in program.graph.nodes}
        same, states = hoist.frozen(program), hoist.samples(program)
        free = [at for at, (region, *_) in enumerate(steps) if region.outputs and all(nodes[name] in same for name in region.outputs)
                and not any(effectful(node) for node in region.graph.nodes if node.op == "call_function")]
        dear = [at for at in free if any(hoist.product(node) for node in steps[at][0].graph.nodes)]
        if not dear:
            self.why = "no region with products depends on frozen state alone"
            return
        values: dict[str, Rows] = {}
        while dear:  # a region whose values hold samples in another way (tables of positions, say) is run in every step
            found = {name: hoist.kept_apart(nodes[name], states) for name in self._leaving(set(dear))}
            wrong = {name: why for name, why in found.items() if isinstance(why, str)}
            values = {name: rows for name, rows in found.items() if isinstance(rows, Rows)}
            if not wrong:
                break
            self.why = "; ".join(f"`{name}`: {why}" for name, why in list(wrong.items())[:2])
            dear = [at for at in dear if not set(steps[at][0].outputs) & wrong.keys()]
        if not dear:
            return
        self.why = ""
        self.values = values
        self.skipped = frozenset(self._unread(set(dear), free))
        self.first = self._before(set(dear), free)
        used = ancestors([nodes[name] for name in values])
        self.given = [(index, isinstance(states[node], Rows)) for index, node in enumerate(program.placeholders) if node in used]
        if not any(rows for _, rows in self.given):
            self.values, self.skipped, self.why = {}, frozenset(), "what is frozen depends on no input with samples"

    def _leaving(self, inside: set[int]) -> list[str]:
        """What other regions, or the caller, read of some regions."""
        made = {name for at in inside for name in self.binding.steps[at][0].outputs}
        read = {name for at, (region, *_) in enumerate(self.binding.steps) if at not in inside for name in region.inputs}
        return [name for name in dict.fromkeys(n for at in sorted(inside) for n in self.binding.steps[at][0].outputs) if name in made & (read | self._kept())]

    def _kept(self) -> set[str]:
        schedule = self.binding.schedule
        return {str(o) for o in schedule.outputs if is_ref(o)} | {a.name for v in schedule.views for a in v.all_input_nodes} | {
            name for values, *_ in self.binding.lazy.values() for name in values}

    def _unread(self, inside: set[int], free: Sequence[int]) -> set[int]:
        """These steps, and the frozen ones that only they read."""
        found = set(inside)
        for at in reversed(free):
            made = set(self.binding.steps[at][0].outputs)
            readers = {other for other, (region, *_) in enumerate(self.binding.steps) if made & set(region.inputs)}
            if readers <= found and not made & self._kept():
                found.add(at)
        return found

    def _before(self, inside: set[int], free: Sequence[int]) -> list[int]:
        """These steps, and those that make what they read, in order."""
        wanted: set[str] = set()
        found = []
        for at in reversed(range(len(self.binding.steps))):
            region = self.binding.steps[at][0]
            if at in inside or at in free and wanted & set(region.outputs):
                found.append(at)
                wanted |= set(region.inputs)
        return found[::-1]

    # -- a call ----------------------------------------------------------------------------------------------------

    def fill(self, env: dict[str, Any], tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        """Put what is kept of a call's samples into `env`, after computing it for new samples. Returns the steps to leave out."""
        given = [tensors[index] for index, _ in self.given] if self.values else []
        hooked = any(block is not None and (block._forward_hooks or block._forward_pre_hooks) for block in (self.binding.steps[at][2] for at in self.skipped))
        if not self.values or hooked or any(t.requires_grad for t in given):
            self.bypassed += bool(self.values)
            return frozenset()
        batch = next(tensors[index].shape[0] for index, rows in self.given if rows)
        if batch == 0 or any(tensors[index].shape[0] != batch for index, rows in self.given if rows):
            self.bypassed += 1
            return frozenset()
        store, device = self._present(), given[0].device
        keys = self._keys(tensors, batch)
        found = {key: store.get(key, device) for key in dict.fromkeys(keys)}
        new = [keys.index(key) for key, values in found.items() if values is None]
        self.hits, self.misses = self.hits + batch - len(new), self.misses + len(new)
        if new:
            for place, values in zip(new, self._compute(tensors, new), strict=True):
                found[keys[place]] = values
                store.put(keys[place], values)
        for index, (name, rows) in enumerate(self.values.items()):
            env[name] = torch.cat([found[key][index] for key in keys], dim=rows.dim)
        return self.skipped

    def _compute(self, tensors: Sequence[torch.Tensor], samples: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        """The values of some samples of a call."""
        chosen = torch.tensor(samples if len(samples) > 1 else [*samples, *samples], device=tensors[0].device)  # a batch of one may be another program's
        env: dict[str, Any] = dict(zip(self.binding.inputs, tensors))
        for index, rows in self.given:
            if rows:
                env[self.binding.inputs[index]] = tensors[index].index_select(0, chosen)
        with torch.no_grad():
            for at in self.first:
                region, runner, _, cells = self.binding.steps[at]
                outs = runner.inference(*(env[name] for name in region.inputs), *(store[leaf] for store, leaf in cells))
                env.update(zip(region.outputs, outs))
        values = [(env[name], rows.dim, env[name].shape[rows.dim] // len(chosen)) for name, rows in self.values.items()]
        return [tuple(value.narrow(dim, place * each, each).clone() for value, dim, each in values) for place in range(len(samples))]

    def _keys(self, tensors: Sequence[torch.Tensor], batch: int) -> list[str]:
        """A hash of each sample: the bytes, sizes and dtypes of its inputs, and what is no sample's."""
        shared = hashlib.blake2b(digest_size=32)
        device = tensors[self.given[0][0]].device.type
        shared.update(repr((torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None, self.binding.program.training)).encode())
        for index, rows in self.given:
            shared.update(repr((index, tensors[index].dtype, tuple(tensors[index].shape[1 if rows else 0:]))).encode())
            if not rows:
                shared.update(_bytes(tensors[index]))
        keys = []
        parts = [_bytes(tensors[index], batch) for index, rows in self.given if rows]
        for sample in range(batch):
            own = shared.copy()
            for each in parts:
                own.update(each[sample])
            keys.append(own.hexdigest())
        return keys

    def _present(self) -> Memory | Folder:
        """The store of the present weights."""
        live = [store[leaf] for store, leaf in self.cells]
        versions = [_bytes(t) if t.nbytes <= _SMALL else (id(t), t.data_ptr(), t._version) for t in live if isinstance(t, torch.Tensor)]
        if self.store is None or versions != self.versions:
            if self.store is not None:
                self.dropped += 1
                log.warning("fxopt: hoist: weights in front of the trained layers changed; the %s kept for samples are dropped", _size(self.store.held))
                if isinstance(self.store, Memory):
                    self.store.drop()
            self.versions = versions
            self.store = Memory(self.fact.bytes) if self.fact.folder is None else Folder(Path(self.fact.folder) / self._weights(live), self.fact.bytes)
        return self.store

    def _weights(self, live: Sequence[Any]) -> str:
        """A hash of the weights and of the graphs that read them: what was kept by another run holds only for the same."""
        found = hashlib.blake2b(digest_size=16)
        for at in self.first:
            found.update(f"{self.binding.steps[at][0].key} {list(self.values)} {torch.__version__}".encode())
        for t in live:
            if isinstance(t, torch.Tensor):
                found.update(repr((t.dtype, tuple(t.shape))).encode())
                found.update(_bytes(t))
        return found.hexdigest()

    def __str__(self) -> str:
        if not self.values:
            return f"hoist: nothing is left out: {self.why}"
        blocks = [str(self.binding.steps[at][0].path) for at in sorted(self.skipped) if self.binding.steps[at][0].path is not None]
        held = self.store.held if self.store is not None else 0
        text = f"hoist: {len(self.skipped)} regions ({blocks[0]} to {blocks[-1]}) are left out" if blocks else f"hoist: {len(self.skipped)} regions are left out"
        text += f"; samples found {self.hits}, computed {self.misses}; {_size(held)} of {_size(self.fact.bytes)} kept in {self.fact.folder or 'memory'}"
        text += f"; dropped {self.dropped} times because weights changed" if self.dropped else ""
        return text + (f"; {self.bypassed} calls ran without (hooks on a region that would be left out, or inputs that take a gradient)" if self.bypassed else "")


def _bytes(tensor: torch.Tensor, parts: int | None = None) -> Any:
    """The bytes of a tensor; of each of `parts` pieces of the first dimension."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.tobytes() if parts is None else [piece.tobytes() for piece in flat.reshape(parts, -1)]


def _size(number: int) -> str:
    return f"{number / 2**20:.3g} MiB"


def of(binding: Binding) -> Hoisting | None:
    """What a program's facts ask for."""
    fact = next((fact for fact in binding.program.facts if isinstance(fact, Hoist)), None)
    return None if fact is None else Hoisting(binding, fact)


