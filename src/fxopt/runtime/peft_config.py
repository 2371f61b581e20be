"""The `adapter_config.json` of PEFT: written so that PEFT adapts exactly our modules, read more strictly than PEFT.

PEFT's own reader uses alpha 8 for a file without `lora_alpha`, runs regular expressions from the file without a
bound, and skips fields that it does not know. Here each of those is an error with a name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.errors import DataError
from fxopt.runtime.module_pattern import ModulePatterns

PEFT_VERSION = "0.21.2"
"""The PEFT release whose 41 fields are written."""

_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

_DESCRIPTIVE = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode lora_ga_config "
    "loftq_config megatron_core peft_version qalora_group_size revision task_type".split()
)
"""Fields that describe the adapter's history or its training and do not change what a saved adapter computes."""

_READ = frozenset(
    "alpha_pattern bias ensure_weight_tying exclude_modules fan_in_fan_out init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern target_modules "
    "target_parameters use_dora use_rslora".split()
)
"""Fields that `parse` reads. Every other field must be empty (null, false, 0, "none", [] or {})."""

_INITS_ON_PLAIN_BASE = ("true", "false", "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA …)
change them, so their adapter is only right on a base that this file does not describe."""

@dataclass(frozen=True)
class Scale:
    """How one weight's adapter is scaled: alpha / r, or alpha / sqrt(r) with `use_rslora`."""

    r: int
    alpha: float


@dataclass(frozen=True)
class AdapterConfig:
    """The part of an `adapter_config.json` that decides what an adapter computes."""

    default: Scale
    rslora: bool
    dora: bool
    dropout: float
    fan_in_fan_out: bool
    targets: tuple[str, ...] | None
    """Names or suffixes of the adapted modules; None when the file gives a regular expression, which is not run:
    the tensors in the file name the modules."""
    parameters: tuple[str, ...]
    """Names or suffixes of parameters that are adapted themselves (stacks of experts)."""
    saved: tuple[str, ...]
    """Ends of the paths of modules that are trained whole."""
    tied: bool
    """What the embedding has, its tied head has too. PEFT takes the head out of the lists that it writes."""
    ranks: ModulePatterns[int]
    alphas: ModulePatterns[float]

    def scale(self, path: str) -> Scale:
        """The rank and alpha of the module at `path`, as PEFT resolves the patterns: the first match wins."""
        return Scale(self.ranks.get(path, self.default.r), self.alphas.get(path, self.default.alpha))

    def covers(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path` (always true for a regular expression, see `targets`)."""
        return self.targets is None or _ends(path, self.targets)

    def covers_parameter(self, name: str) -> bool:
        """Whether PEFT would adapt this parameter itself."""
        return _ends(name, self.parameters)

    def saves(self, path: str) -> bool:
        """Whether the module at `path`, or one that it lies in, is trained whole."""
        return lies_in(path, self.saved)


def lies_in(path: str, ends: tuple[str, ...]) -> bool:
    """Whether a module, or one that it lies in, has a path with one of these ends: so PEFT finds modules to save."""
    parts = path.split(".")
    return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts) + 1))


def _ends(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def build(
    scales: Mapping[str, Scale],
    parameters: Mapping[str, Scale],
    *,
    rslora: bool,
    dora: bool,
    dropout: float,
    saved: Sequence[str],
    tied: bool,
    fan_in_fan_out: bool,
    modules: Iterable[str] | None,
    base_model: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """The 41 fields that PEFT writes, for adapters at the module paths of `scales` and of the named `parameters`.

    `modules` are the paths of all modules of the base model. With them `target_modules` is made of the shortest
    names that select exactly the given paths; without them it is the list of full paths. `saved` are paths of modules
    that are trained whole.
    """
    every = {**scales, **parameters}
    common = Counter(every.values()).most_common(1)[0][0] if every else Scale(_DEFAULTS["r"], _DEFAULTS["lora_alpha"])
    different = {f"^{re.escape(path)}": scale for path, scale in every.items() if scale != common}
    return _DEFAULTS | {
        "r": common.r,
        "lora_alpha": _plain(common.alpha),
        # Both patterns name every differing module: one release of PEFT looks one key up in both.
        "rank_pattern": {key: scale.r for key, scale in different.items()},
        "alpha_pattern": {key: _plain(scale.alpha) for key, scale in different.items()},
        "target_modules": target_modules(scales.keys(), modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": list(saved) or None,
        "lora_dropout": _plain(dropout) if dropout else 0.0,
        "use_rslora": rslora,
        "use_dora": dora,
        "ensure_weight_tying": tied,
        "fan_in_fan_out": fan_in_fan_out,
        "base_model_name_or_path": base_model,
        "task_type": task_type,
    }


def target_modules(paths: Collection[str], modules: Iterable[str] | None) -> list[str] | str:
    """A `target_modules` value with which PEFT selects exactly `paths` among `modules`.

    PEFT reads a list entry as a whole path or as the end of one after a dot, and a string as a regular expression
    that must match the whole path. So, in this order: last components where all modules that end so are adapted,
    full paths for the rest; one anchored expression if a full path is also the end of another module's path.
    """
    if modules is None:
        return sorted(paths)
    wanted, every = set(paths), set(modules) - {""}
    if missing := sorted(wanted - every):
        raise DataError(
            f"{len(missing)} adapter(s) belong to no module of the model.",
            where=missing[0],
            do="Give the module paths of the model that the adapters were trained on.",
        )
    by_name: dict[str, set[str]] = {}
    for path in every:
        by_name.setdefault(path.rpartition(".")[2], set()).add(path)
    whole = {name for name, of_name in by_name.items() if of_name <= wanted}
    entries = sorted({name if (name := path.rpartition(".")[2]) in whole else path for path in wanted})
    if {path for path in every if any(path == entry or path.endswith("." + entry) for entry in entries)} == wanted:
        return entries
    return "|".join(re.escape(path) for path in sorted(wanted))


def parse(config: Mapping[str, Any], *, where: str) -> AdapterConfig:
    """Reads the fields of an `adapter_config.json` and refuses, by name, what would compute something else.

    Raises:
        DataError: a required field is missing, a field has the wrong type, or a field asks for arithmetic that
            is not plain LoRA.
    """
    for field in ("peft_type", "r", "lora_alpha", "target_modules"):
        if config.get(field) is None:
            raise DataError(
                f"The adapter configuration has no `{field}`.",
                where=where,
                do="Take the value from the run that trained the adapter: a guessed one scales it wrongly.",
            )
    if config["peft_type"] != "LORA":
        raise DataError(f"The adapter is of type {config['peft_type']!r}, not LORA.", where=where)
    for field, value in config.items():
        _refuse_other_arithmetic(field, value, where)
    targets = config["target_modules"]
    if isinstance(targets, list):
        targets = tuple(_typed(name, str, "target_modules", where) for name in targets)
    else:
        _typed(targets, str, "target_modules", where)
        targets = None
    ranks = _typed(config.get("rank_pattern") or {}, dict, "rank_pattern", where)
    alphas = _typed(config.get("alpha_pattern") or {}, dict, "alpha_pattern", where)
    ranks = {key: _rank(value, "rank_pattern", where) for key, value in ranks.items()}
    alphas = {key: _number(value, "alpha_pattern", where) for key, value in alphas.items()}
    return AdapterConfig(
        default=Scale(_rank(config["r"], "r", where), _number(config["lora_alpha"], "lora_alpha", where)),
        rslora=_typed(config.get("use_rslora", False), bool, "use_rslora", where),
        dora=_typed(config.get("use_dora", False), bool, "use_dora", where),
        dropout=_number(config.get("lora_dropout") or 0.0, "lora_dropout", where),
        fan_in_fan_out=_typed(config.get("fan_in_fan_out", False), bool, "fan_in_fan_out", where),
        targets=targets,
        parameters=_names(config.get("target_parameters"), "target_parameters", where),
        saved=_names(config.get("modules_to_save"), "modules_to_save", where),
        tied=_typed(config.get("ensure_weight_tying", False), bool, "ensure_weight_tying", where),
        ranks=ModulePatterns.of(ranks, field="rank_pattern", where=where),
        alphas=ModulePatterns.of(alphas, field="alpha_pattern", where=where),
    )


def _refuse_other_arithmetic(field: str, value: Any, where: str) -> None:
    if field == "init_lora_weights":
        if str(value).lower() not in _INITS_ON_PLAIN_BASE:
            raise DataError(
                f"The adapter was started with `init_lora_weights` = {value!r}, which changes the base weights.",
                where=where,
                do="Convert it to a plain LoRA adapter first, with the library that trained it.",
            )
    elif field not in _READ | _DESCRIPTIVE and value not in (None, False, 0, "none", [], {}):
        known = "is not plain LoRA" if field in _DEFAULTS else "is not a known field"
        raise DataError(
            f"The adapter configuration sets `{field}`, which {known}: {value!r:.80}.",
            where=where,
            do="Remove the field only if it has no effect on what the adapter computes.",
        )
    elif field == "bias" and value != "none":
        raise DataError(f"The adapter trained biases too (`bias` = {value!r:.80}).", where=where)


def _typed(value: Any, kind: type, field: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"`{field}` must be {kind.__name__}, but is {value!r:.80}.", where=where)
    return value


def _names(value: Any, field: str, where: str) -> tuple[str, ...]:
    names = tuple(_typed(name, str, field, where) for name in _typed(value or [], list, field, where))
    if "" in names:
        raise DataError(f"`{field}` has an empty name.", where=where)
    return names


def _rank(value: Any, field: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"`{field}` must be a whole number above 0, but is {value!r:.80}.", where=where)
    return value


def _number(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"`{field}` must be a number, but is {value!r:.80}.", where=where)
    return float(value)


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
