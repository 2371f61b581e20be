"""A run as a file: YAML with the settings of a trainer, typed, and nothing that is not known."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fxopt.data import Dataset, load_tokenizer
from fxopt.errors import DataError
from fxopt.train import optimizers
from fxopt.train.averaging import Averaged
from fxopt.train.freezing import Freezing
from fxopt.train.guard import Spikes
from fxopt.train.loader import Loader
from fxopt.train.optimizers import Group
from fxopt.train.saver import Checkpoints
from fxopt.train.schedule import Plateau
from fxopt.train.settings import described
from fxopt.train.stopping import EarlyStopping
from fxopt.train.texts import text_loader
from fxopt.train.trainer import Trainer

KINDS: dict[str, Any] = {"EarlyStopping": EarlyStopping, "Averaged": Averaged, "Freezing": Freezing, "Plateau": Plateau, "Group": Group, "lora_plus": optimizers.lora_plus,
                         "no_decay": optimizers.no_decay}
"""What an entry with `kind:` may be."""
_NESTED = {"checkpoints": Checkpoints, "spikes": Spikes}


@dataclass
class Data:
    """Where batches come from.

    Attributes:
        train: `package.module:function`, called without arguments; it gives batches, a `fxopt.Loader`, a torch DataLoader, or a data set with
            `trainer.batch_size`. val: the same for validation; with `path`, a file.
        path: a file of text instead, read by `fxopt.data.Dataset`; the settings below are for it.
        tokenizer: a folder or file; None: the model's folder. held_out: rows of `path` that are drawn for validation.
        packing: tokens of a packed row; None: padded batches of `trainer.batch_size` samples of similar length.
        format, columns, length, long, train_on, template, template_arguments, date: see `fxopt.data.Dataset`.
    """

    train: str | None = None
    val: str | None = None
    path: str | None = None
    tokenizer: str | None = None
    held_out: int | None = None
    packing: int | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    length: int | None = None
    long: str = "cut"
    train_on: str | None = None
    template: str | None = None
    template_arguments: dict[str, Any] | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.path is None):
            what = "'train' is missing, and 'path' too." if self.path is None else "Give either `train` or `path`."
            raise DataError(what, where="data", do="`train` names a function that gives batches, `path` a file of text.")
        if self.path is None and (given := [one.name for one in fields(self) if one.name not in ("train", "val") and getattr(self, one.name) != one.default]):
            raise DataError(f"`{given[0]}` is for a file of text.", where="data", do="Name the file: `path: FILE`.")
        if self.held_out is not None and self.val is not None:
            raise DataError("Give either `val` or `held_out`.", where="data")

    def loaders(self, model: str, trainer: Trainer) -> tuple[Loader, Loader | None, Dataset]:
        """(training, validation, the data set of the file): batches of the files of text.

        Args:
            model: of the configuration. trainer: for its batch_size, workers and seed.

        Raises:
            DataError: see `fxopt.data.Dataset`; there is neither a tokenizer nor a model's folder.
        """
        assert self.path is not None
        if self.tokenizer is None and not Path(model).is_dir():
            raise DataError("There is no tokenizer.", where="data.tokenizer", do="Name its folder: the model is no folder that could hold it.")
        tokenizer = load_tokenizer(self.tokenizer or model)
        settings = {name: getattr(self, name) for name in ("format", "columns", "length", "long", "train_on", "template", "template_arguments", "date")}
        dataset = Dataset(self.path, tokenizer, **settings)
        more = {"workers": trainer.workers, "seed": trainer.seed or 0}
        train, val = dataset.split(self.held_out, trainer.seed or 0) if self.held_out else (dataset, Dataset(self.val, tokenizer, **settings) if self.val is not None else None)
        sizes = {"batch_size": trainer.batch_size if self.packing is None else None, "tokens": self.packing}
        return text_loader(train, **sizes, **more), text_loader(val, **sizes, **more, train=False) if val is not None else None, dataset


@dataclass
class Config:
    """A run.

    Attributes:
        model: `package.module:factory` or a local Hugging Face folder. passes: of `fxopt.optimize`; "none": the model as it is; None: the
            exact ones. data: see `Data`. resume: go on with the newest checkpoint of `trainer.output_dir`, if there is one.
        processes: that train together on this machine, started by `fxopt train` unless a launcher has started them already.
    """

    model: str
    data: Data
    trainer: Trainer
    passes: str | None = None
    resume: bool = False
    processes: int = 1
    given: dict[str, Any] = field(default_factory=dict, repr=False)


class _Loader(yaml.SafeLoader):
    """YAML without names that come twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping's values by name."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice in the mapping of line {node.start_mark.line + 1}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a file.

    Args:
        overrides: `name.name=value`, the value in YAML; they win over the file.

    Raises:
        DataError: no file, no YAML, an unknown name (with the nearest one), or a value of another type.
    """
    try:
        found = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise DataError(f"The configuration cannot be read: {error.strerror or error}.", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"The configuration is no YAML: {str(error).splitlines()[0]}.", where=str(path)) from error
    if not isinstance(found, dict):
        raise DataError("The configuration is not a mapping of names to values.", where=str(path))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise DataError(f"{override!r} sets nothing.", where="the command line", do="Write name.name=value, such as trainer.lr=1e-4.")
        place = found
        *above, last = name.split(".")
        for part in above:
            if not isinstance(place.setdefault(part, {}), dict):
                raise DataError(f"{part} in {name} has no names beneath it.", where="the command line")
            place = place[part]
        place[last] = yaml.safe_load(value)
    return build(found)


def build(values: Mapping[str, Any]) -> Config:
    """A configuration from plain values.

    Raises:
        DataError: see `load`.
    """
    _names(values, ("model", "data", "passes", "trainer", "resume", "processes"), "the configuration", needed=("model", "data"))
    return Config(_converted(values["model"], str, "model"), made(Data, values["data"], "data"), made(Trainer, _trainer(values.get("trainer") or {}), "trainer"),
                  _converted(values.get("passes"), str | None, "passes"), _converted(values.get("resume", False), bool, "resume"), _converted(values.get("processes", 1), int, "processes"), dict(values))


def text(config: Config) -> str:
    """The whole configuration as YAML, defaults included."""
    trainer = {name: value for name, value in described(config.trainer).items() if name not in ("loss", "count", "metrics")}
    given = config.given.get("trainer") or {}
    trainer |= {name: given[name] for name in ("callbacks", "loggers", "groups", "schedule") if name in given}
    data = asdict(config.data) if config.data.path is not None else {"train": config.data.train, "val": config.data.val}
    return yaml.safe_dump({"model": config.model, "data": data, "passes": config.passes, "resume": config.resume, "processes": config.processes,
                           "trainer": {name: {k: v for k, v in value.items() if k != "kind"} if isinstance(value, dict) and name in _NESTED else value for name, value in trainer.items()}},
                          sort_keys=False, allow_unicode=True, width=120)


def _trainer(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise DataError("`trainer` is not a mapping of names to values.", where="trainer")
    found = {name: made(_NESTED[name], value, f"trainer.{name}") if name in _NESTED and isinstance(value, Mapping) else value if name == "loggers" else _kinds(value, f"trainer.{name}") for name, value in values.items()}
    for name in ("callbacks", "groups"):
        if name in found and not isinstance(found[name], (list, tuple)):
            raise DataError(f"`{name}` is not a list.", where=f"trainer.{name}", do=f"Write {name}: [...].")
    if isinstance(found.get("groups"), list):  # lora_plus and no_decay give several
        found["groups"] = [group for entry in found["groups"] for group in (entry if isinstance(entry, tuple) else (entry,))]
    return found


def _kinds(value: Any, where: str) -> Any:
    """The value with every mapping that has a `kind` made into what it says."""
    if isinstance(value, list):
        return [_kinds(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, Mapping) or "kind" not in value:
        return value
    kind = value["kind"]
    if kind not in KINDS:
        raise DataError(f"There is no kind {kind!r}.", where=where, do=_near(str(kind), KINDS))
    return made(KINDS[kind], {name: item for name, item in value.items() if name != "kind"}, where)


def made(target: Any, values: Any, where: str) -> Any:
    """Call a class or function with values, each checked against its type.

    Raises:
        DataError: an unknown or missing name, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"{values!r} is not a mapping of names to values.", where=where)
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function)
    parameters = {name: parameter for name, parameter in inspect.signature(target).parameters.items()}
    needed = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    _names(values, parameters, where, needed)
    return target(**{name: _converted(value, hints.get(name, Any), f"{where}.{name}") for name, value in values.items()})


def _names(values: Mapping[str, Any], known: collections.abc.Collection[str], where: str, needed: Sequence[str] = ()) -> None:
    for name in values:
        if name not in known:
            raise DataError(f"There is no {name!r}.", where=where, do=_near(str(name), known))
    if missing := [name for name in needed if name not in values]:
        raise DataError(f"{missing[0]!r} is missing.", where=where)


def _near(name: str, known: collections.abc.Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"Do you mean {near[0]}?" if near else f"There are {', '.join(known)}."


def _converted(value: Any, hint: Any, where: str) -> Any:
    """The value as its type says. Numbers that YAML takes for strings (1e-4) are numbers where one is wanted."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options]
    if value is None:
        if type(None) in kinds or Any in kinds:
            return None
        raise DataError("A value is missing.", where=where)
    if isinstance(value, bool):
        if bool in kinds or Any in kinds:
            return value
    elif isinstance(value, str) and str not in kinds and float in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, int) and (int in kinds or float in kinds):
        return value if int in kinds else float(value)
    elif isinstance(value, (list, tuple)) and (taken := [kind for kind in kinds if kind in (list, tuple, collections.abc.Sequence)]):
        return tuple(value) if tuple in taken else list(value)
    elif isinstance(value, Mapping) and any(kind in (dict, collections.abc.Mapping) for kind in kinds):
        return dict(value)
    elif isinstance(value, (str, float)) and (type(value) in kinds or isinstance(value, str) and Path in kinds):
        return value
    elif not isinstance(value, (str, int, float, list, tuple, Mapping)):
        return value  # made from a `kind`
    if Any in kinds:
        return value
    wanted = ", ".join("nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise DataError(f"{value!r} is a {type(value).__name__}; wanted is {wanted}.", where=where)
