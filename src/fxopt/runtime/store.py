"""LoRA adapters on disk, in the format of PEFT, both ways.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. What is written here loads in PEFT with equal
logits; what PEFT wrote loads here, or is refused with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fxopt.errors import DataError
from fxopt.runtime import peft_config, peft_keys
from fxopt.runtime.files import read_json, replace_file
from fxopt.runtime.peft_config import AdapterConfig, Scale
from fxopt.runtime.peft_keys import Found

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

Shapes = Callable[[str], Mapping[str, tuple[int, ...]]]
"""The shapes of a module's own parameters by name, in the order of their registration, for a module path."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """The LoRA of one weight: scale * B A is added to it.

    Args:
        path: module path in the base model, such as `model.layers.0.self_attn.q_proj`.
        a: [r, in] of a linear layer, [r, vocabulary] of an embedding, [r, in, *kernel] of a convolution, [experts, r, m] of a
            stack; floating point.
        b: [out, r], [width, r], [out, r, 1, ...], [experts, n, r].
        alpha: LoRA alpha; `scale` is alpha / r, or alpha / sqrt(r) with `rslora`.
        rslora: rank-stabilised scale.
        fan_in_fan_out: the base weight is stored as [in, out] (the Conv1D of GPT-2); a and b are not affected.
        kind: "linear", "embedding", "conv" or "experts". Of a stack, B A is [experts, n, m], or (if the module says `is_transposed`)
            its transpose is added: that is PEFT's reading of such files.
        parameter: which of the module's parameters it is. Another one than `weight`, and a stack, is what PEFT calls a target
            parameter.
        magnitude: DoRA's, one for each output ([out]; [1, out, 1, ...] of a convolution), or None.

    Raises:
        DataError: the shapes do not fit together.
    """

    path: str
    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    fan_in_fan_out: bool = False
    kind: str = "linear"
    parameter: str = "weight"
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise DataError("An adapter has no module path.")
        a, b, what = self.a.shape, self.b.shape, "[r, in] and [out, r]"
        if self.kind == "conv":
            fits, what = len(a) == len(b) > 2 and a[0] == b[1] and set(b[2:]) == {1}, "[r, in, *kernel] and [out, r, 1, ...]"
        elif self.kind == "experts":
            fits, what = len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2] and a[0] > 0, "[experts, r, in] and [experts, out, r]"
        else:
            fits = len(a) == len(b) == 2 and a[0] == b[1]
        if not fits or not self.r:
            raise DataError(f"The adapter's shapes do not fit: a is {list(a)}, b is {list(b)}; they must be {what}.", where=self.path)
        outputs = b[0] if self.kind != "experts" else b[1]
        if self.magnitude is not None and self.magnitude.numel() != outputs:
            raise DataError(f"The adapter's shapes do not fit: {self.magnitude.numel()} magnitudes for {outputs} outputs.", where=self.path)
        for tensor in (self.a, self.b, *([self.magnitude] if self.magnitude is not None else [])):
            if not tensor.is_floating_point():
                raise DataError(f"The adapter is not floating point: {tensor.dtype}.", where=self.path)
        if not math.isfinite(self.alpha):
            raise DataError(f"The adapter's alpha is {self.alpha}.", where=self.path)

    @property
    def r(self) -> int:
        """The rank."""
        return self.a.shape[1 if self.kind == "experts" else 0]

    @property
    def scale(self) -> float:
        """What the product of a and b is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def by_parameter(self) -> bool:
        """Whether PEFT knows it as the adapter of a parameter, not of a module."""
        return self.kind == "experts" or self.parameter != "weight"

    @property
    def key(self) -> str:
        """What PEFT matches with its patterns: the module's path, or the parameter's name."""
        return f"{self.path}.{self.parameter}" if self.by_parameter else self.path


@dataclass(frozen=True, eq=False)
class Contents:
    """What a PEFT folder holds.

    Attributes:
        adapters: by path.
        saved: state of modules that are trained whole, by its name in the base model.
        base: the base's own weights that the file has beside adapters of embeddings and heads, by name; they are no part of the
            adapter, but it was trained on them.
        dropout: of the adapters' input, in training.
    """

    adapters: list[Adapter]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0


def write_adapters(
    folder: str | Path,
    adapters: Iterable[Adapter],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    modules: Iterable[str] | None = None,
    saved: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
    tied: bool = False,
) -> Path:
    """Writes `adapters` as a PEFT folder and returns the folder.

    Ranks and alphas may differ between adapters. If only some are rank-stabilised, theirs are written as the
    equal plain alpha (PEFT has one switch for the whole file).

    Args:
        folder: made when absent. Old adapter files in it are replaced, each in one step.
        adapters: at most one per weight; those of one module's parameters in the order of their registration.
            Tensors keep their dtype and may lie on any device.
        base_model: name or folder of the base model, for the file.
        task_type: PEFT's task, such as `CAUSAL_LM`: decides the class that PEFT wraps the model with.
        modules: paths of all modules of the base model (`name for name, _ in model.named_modules()`). With them
            the written `target_modules` is short and selects exactly the adapters' modules; without them it is
            the list of full paths, which PEFT also matches as ends of longer paths.
        saved: all state of modules that are trained whole, by name. dropout: of the adapters' input.
        tied: the adapters of the embedding and of the head are one.

    Raises:
        DataError: nothing to write, two adapters for one weight, one for no module of the model, only some with magnitudes, what
            PEFT cannot hold, or the disk refuses.
    """
    adapters, saved = list(adapters), dict(saved or {})
    modules = None if modules is None else list(modules)
    by_key = {adapter.key: adapter for adapter in adapters}
    if len(by_key) != len(adapters) or not (adapters or saved):
        raise DataError(
            "Two adapters have the same module path." if adapters else "There is no adapter to write.",
            where=str(folder),
        )
    dora = {adapter.magnitude is not None for adapter in adapters}
    if len(dora) > 1:
        raise DataError("Some adapters have DoRA's magnitudes and some have none; PEFT has one switch for all.", where=str(folder))
    direct = [adapter for adapter in adapters if adapter.by_parameter]
    if direct and (dora == {True} or dropout):
        raise DataError("PEFT's adapters of parameters have no DoRA and no dropout.", where=direct[0].key)
    rslora = all(adapter.rslora for adapter in adapters)
    scales = {
        adapter.key: Scale(adapter.r, adapter.alpha if adapter.rslora == rslora else adapter.scale * adapter.r)
        for adapter in adapters
    }
    config = peft_config.build(
        {key: scale for key, scale in scales.items() if not by_key[key].by_parameter},
        {key: scale for key, scale in scales.items() if by_key[key].by_parameter},
        rslora=rslora and bool(adapters),
        dora=dora == {True},
        dropout=dropout,
        saved=peft_keys.topmost(list(saved), str(folder), modules),
        tied=tied,
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        modules=modules,
        base_model=base_model,
        task_type=task_type,
    )
    tensors = {peft_keys.PREFIX + name: peft_keys.owned(value) for name, value in saved.items()}
    depth = peft_keys.depths((adapter.path, adapter.parameter) for adapter in direct)
    for adapter in adapters:
        a, b = peft_keys.stacked(adapter.a, adapter.b) if adapter.kind == "experts" else (adapter.a, adapter.b)
        names = peft_keys.names(adapter.path, adapter.kind, depth.get((adapter.path, adapter.parameter), 0) if adapter.by_parameter else 0)
        parts = {"a": a, "b": b, "magnitude": adapter.magnitude}
        tensors |= {names[part]: peft_keys.owned(value) for part, value in parts.items() if value is not None}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"The folder could not be made: {error.strerror or error}.", where=str(folder)) from error
    replace_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def read_adapters(folder: str | Path) -> list[Adapter]:
    """The adapters of a folder that holds nothing else; see `read`.

    Raises:
        DataError: as `read`; or modules that are trained whole lie in it too.
    """
    contents = read(folder)
    if contents.saved:
        raise DataError(f"The file also holds modules that were trained whole: {', '.join(list(contents.saved)[:4])}.", where=str(folder))
    return contents.adapters


def read(folder: str | Path, shapes: Shapes | None = None) -> Contents:
    """Reads a PEFT LoRA folder: one `Adapter` per adapted weight, sorted by path, tensors on the CPU.

    Stricter than PEFT: nothing is guessed, nothing is skipped, nothing is unpickled. Module selections by regular
    expression are not run: the tensors in the file say which modules are adapted.

    Args:
        shapes: of the base model's parameters. Needed for adapters of parameters, whose names are not in the file.

    Raises:
        DataError: a file is missing, damaged or too large; `r`, `lora_alpha` or `target_modules` is missing; a
            tensor has no partner, a wrong shape or a rank other than the configuration's; the configuration asks
            for something that is not LoRA or DoRA.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights_path.exists() and (folder / "adapter_model.bin").exists():
        raise DataError(
            "The adapter's weights are a pickle file, which can run code; it is not opened.",
            where=str(folder / "adapter_model.bin"),
            do="Load it in PEFT and save it with safe_serialization=True.",
        )
    config = peft_config.parse(read_json(config_path), where=str(config_path))
    found, saved = peft_keys.sort(_read_tensors(weights_path), str(weights_path))
    if not found and not saved:
        raise DataError("The file holds no tensors.", where=str(weights_path))
    for name in saved:
        if not (config.saves(name.rpartition(".")[0]) or config.tied):  # a tied module is in no list: see AdapterConfig.tied
            raise DataError(f"The file holds {name}, which is no part of an adapter and not of its `modules_to_save`.", where=str(weights_path))
    for path in config.saved:
        if not any(peft_config.lies_in(name.rpartition(".")[0], (path,)) for name in saved):
            raise DataError(f"`modules_to_save` names {path!r}, of which the file holds nothing.", where=str(weights_path))
    adapters, base = [], {}
    for item in found:
        adapters.append(_adapter(item, config, shapes, f"{weights_path}: {item.path}"))
        base |= {f"{item.path}.{part.removeprefix('base ')}": tensor for part, tensor in item.parts.items() if part.startswith("base ")}
    return Contents(adapters, saved, base, config.dropout)


def _adapter(item: Found, config: AdapterConfig, shapes: Shapes | None, where: str) -> Adapter:
    own = dict(shapes(item.path)) if shapes is not None and config.parameters else {}
    leaves = [leaf for leaf in own if config.covers_parameter(f"{item.path}.{leaf}")]
    a, b, magnitude = (item.parts.get(part) for part in ("a", "b", "magnitude"))
    kind, leaf = "embedding" if item.embedding else "linear" if a.dim() == 2 else "conv", "weight"
    if leaves:
        if item.depth >= len(leaves):
            raise DataError(f"The file holds adapters of {item.depth + 1} parameters, of which the model has {len(leaves)}.", where=where)
        leaf = leaves[len(leaves) - 1 - item.depth]
        if len(own[leaf]) == 3:
            kind = "experts"
            a, b = peft_keys.unstacked(a, b, own[leaf][0], where)
    elif config.parameters and not config.covers(item.path):
        raise DataError("The file holds the adapter of a parameter, whose name only the model knows." if shapes is None else
                        "The file holds the adapter of a parameter that the model does not have.", where=where)
    elif item.depth or not (config.covers(item.path) or config.tied):
        raise DataError("The file holds an adapter that its `target_modules` does not select.", where=where)
    key = f"{item.path}.{leaf}" if leaves else item.path
    expected = config.scale(key)
    adapter = Adapter(item.path, a, b, expected.alpha, rslora=config.rslora, fan_in_fan_out=config.fan_in_fan_out, kind=kind, parameter=leaf,
                      magnitude=magnitude)
    if adapter.r != expected.r:
        raise DataError(
            f"The adapter's rank is {adapter.r}, but the configuration says {expected.r}.",
            where=where,
            do="The two files are not of the same adapter, or `rank_pattern` is wrong.",
        )
    if config.dora != (magnitude is not None):
        raise DataError(f"`use_dora` is {config.dora}, and the adapter has {'no' if magnitude is None else 'DoRA'} magnitudes.", where=where)
    return adapter


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"The weights could not be read: {error}.", where=str(path)) from error
