"""LoRA adapters on disk, in the format of PEFT, both ways.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. What is written here loads in PEFT with equal
logits; what PEFT wrote loads here, or is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
import torch
from torch import Tensor

from fxopt.errors import DataError
from fxopt.runtime import peft_config
from fxopt.runtime.files import read_json, replace_file
from fxopt.runtime.module_pattern import LENGTH_LIMIT
from fxopt.runtime.peft_config import Scale

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, eq=False)
class Adapter:
    """The LoRA of one linear layer: the layer's output plus `scale * (x @ a.T) @ b.T`.

    Args:
        path: module path in the base model, such as `model.layers.0.self_attn.q_proj`.
        a: [r, in], floating point.
        b: [out, r], floating point.
        alpha: LoRA alpha; `scale` is alpha / r, or alpha / sqrt(r) with `rslora`.
        rslora: rank-stabilised scale.
        fan_in_fan_out: the base weight is stored as [in, out] (the Conv1D of GPT-2); a and b are not affected.

    Raises:
        DataError: the shapes do not fit together.
    """

    path: str
    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise DataError("An adapter has no module path.")
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1] or not self.a.shape[0]:
            raise DataError(
                f"The adapter's shapes do not fit: a is {list(self.a.shape)}, b is {list(self.b.shape)}; "
                "they must be [r, in] and [out, r].",
                where=self.path,
            )
        if not (self.a.is_floating_point() and self.b.is_floating_point()):
            raise DataError(f"The adapter is not floating point: a {self.a.dtype}, b {self.b.dtype}.", where=self.path)
        if not math.isfinite(self.alpha):
            raise DataError(f"The adapter's alpha is {self.alpha}.", where=self.path)

    @property
    def r(self) -> int:
        """The rank."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """What the product of a and b is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def write_adapters(
    folder: str | Path,
    adapters: Iterable[Adapter],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    modules: Iterable[str] | None = None,
) -> Path:
    """Writes `adapters` as a PEFT folder and returns the folder.

    Ranks and alphas may differ between adapters. If only some are rank-stabilised, theirs are written as the
    equal plain alpha (PEFT has one switch for the whole file).

    Args:
        folder: made when absent. Old adapter files in it are replaced, each in one step.
        adapters: at most one per module path. Tensors keep their dtype and may lie on any device.
        base_model: name or folder of the base model, for the file.
        task_type: PEFT's task, such as `CAUSAL_LM`: decides the class that PEFT wraps the model with.
        modules: paths of all modules of the base model (`name for name, _ in model.named_modules()`). With them
            the written `target_modules` is short and selects exactly the adapters' modules; without them it is
            the list of full paths, which PEFT also matches as ends of longer paths.

    Raises:
        DataError: no adapter, two for one module, one for no module of the model, or the disk refuses.
    """
    adapters = list(adapters)
    by_path = {adapter.path: adapter for adapter in adapters}
    if not adapters or len(by_path) != len(adapters):
        raise DataError(
            "Two adapters have the same module path." if adapters else "There is no adapter to write.",
            where=str(folder),
        )
    rslora = all(adapter.rslora for adapter in adapters)
    scales = {
        adapter.path: Scale(adapter.r, adapter.alpha if adapter.rslora == rslora else adapter.scale * adapter.r)
        for adapter in adapters
    }
    config = peft_config.build(
        scales,
        rslora=rslora,
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        modules=modules,
        base_model=base_model,
        task_type=task_type,
    )
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        tensors[_PREFIX + adapter.path + _A] = _owned(adapter.a)
        tensors[_PREFIX + adapter.path + _B] = _owned(adapter.b)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"The folder could not be made: {error.strerror or error}.", where=str(folder)) from error
    replace_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def read_adapters(folder: str | Path) -> list[Adapter]:
    """Reads a PEFT LoRA folder: one `Adapter` per adapted linear layer, sorted by path, tensors on the CPU.

    Stricter than PEFT: nothing is guessed, nothing is skipped, nothing is unpickled. Module selections by regular
    expression are not run: the tensors in the file say which modules are adapted.

    Raises:
        DataError: a file is missing, damaged or too large; `r`, `lora_alpha` or `target_modules` is missing; a
            tensor has no partner, a wrong shape or a rank other than the configuration's; the configuration asks
            for something that is not plain LoRA on linear layers.
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
    tensors = _read_tensors(weights_path)
    paths = _paths(tensors, weights_path)
    adapters = []
    for path in paths:
        where = f"{weights_path}: {path}"
        if not config.covers(path):
            raise DataError("The file holds an adapter that its `target_modules` does not select.", where=where)
        expected = config.scale(path)
        adapter = Adapter(
            path,
            tensors[_PREFIX + path + _A],
            tensors[_PREFIX + path + _B],
            expected.alpha,
            rslora=config.rslora,
            fan_in_fan_out=config.fan_in_fan_out,
        )
        if adapter.r != expected.r:
            raise DataError(
                f"The adapter's rank is {adapter.r}, but the configuration says {expected.r}.",
                where=where,
                do="The two files are not of the same adapter, or `rank_pattern` is wrong.",
            )
        adapters.append(adapter)
    return adapters


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with storage of its own (parameters may be views of one flat buffer)."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"The weights could not be read: {error}.", where=str(path)) from error


def _paths(keys: Iterable[str], where: Path) -> Sequence[str]:
    """The module paths of the tensor names, each of which must have both halves and no other kind of tensor."""
    halves: dict[str, set[str]] = {}
    for key in keys:
        suffix = next((suffix for suffix in (_A, _B) if key.endswith(suffix)), None)
        path = key.removeprefix(_PREFIX).removesuffix(suffix or "")
        if suffix is None or not key.startswith(_PREFIX) or not path or len(path) > LENGTH_LIMIT:
            raise DataError(
                f"The tensor {key!r:.200} is not half of a linear layer's LoRA.",
                where=str(where),
                do="DoRA, embedding adapters, biases and fully trained modules are not read.",
            )
        halves.setdefault(path, set()).add(suffix)
    if not halves:
        raise DataError("The file holds no tensors.", where=str(where))
    for path, found in halves.items():
        if len(found) != 2:
            raise DataError(f"The adapter has only {min(found)[1:]}, not both halves.", where=f"{where}: {path}")
    return sorted(halves)
