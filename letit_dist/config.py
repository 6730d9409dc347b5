"""Strict configuration: YAML files with `base:`, dotted overrides, and all errors at once.

Nothing here imports torch, so that `--help` and a misspelt key answer at once. Sections whose schema depends
on a `kind` (autoencoder, energy, recipe) are looked up in their registry while the file is being loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)
from pydantic.fields import FieldInfo

from letit_dist.errors import UserError
from letit_dist.registry import M, Registry

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class StrictConfig(BaseModel):
    """Base of every schema: unknown keys are errors, values are frozen, numbers are not guessed from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Kind:
    """Annotation of a section whose schema is the `config_class` of the kind it names."""

    def __init__(self, registry: Registry[Any, Any]):
        self.registry = registry


T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
# Names of the two forms of `OneOrMany`, left out of the keys in messages.
_ONE, _MANY = "a value", "a list"
# The type of a setting that is one value, or one for each level of a growing network.
OneOrMany = Annotated[
    Annotated[T, Tag(_ONE)] | Annotated[tuple[T, ...], Tag(_MANY)],
    Discriminator(lambda value: _MANY if isinstance(value, (list, tuple)) else _ONE),
]


def by_level(value: T | tuple[T, ...], levels: int, key: str) -> list[T]:
    """One value for each level of a growing network: a list is taken as it is, a single value is repeated.

    Raises UserError for a list of another length: extending it by its last value would hide a slip.
    """
    if not isinstance(value, tuple):
        return [value] * levels
    if len(value) != levels:
        what = f"the network grows over {levels} levels" if levels > 1 else "this recipe does not grow"
        raise UserError(f"{key}: {len(value)} values, but {what}: give {levels}, or a single one for all")
    return list(value)


C = TypeVar("C", bound=StrictConfig)
Tree = dict[str, Any]
Origins = dict[tuple[str, ...], str]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error and 1e-4 is a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            line = key_node.start_mark.line + 1
            raise UserError(f"{loader.name}:{line}: key {key_node.value!r} is given twice")
        seen.add(key_node.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _scalar(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; everyone who writes it means the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE") else value
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: _scalar(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_scalar(item) for item in value]
    return value


def _read(path: Path) -> Tree:
    try:
        with path.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f", did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no such file: {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return _scalar(tree)


def _merge(into: Tree, tree: Tree, origins: Origins, origin: str, prefix: tuple[str, ...] = ()) -> None:
    for key, value in tree.items():
        at = (*prefix, str(key))
        origins[at] = origin
        below = into.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            # Another kind is another schema: what the base said about the old one no longer applies.
            if len(at) == 1 and "kind" in value and "kind" in below and value["kind"] != below["kind"]:
                below = into[key] = {}
            _merge(below, value, origins, origin, at)
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value, origins, origin, at)
        else:
            into[key] = value


def read_tree(path: str | Path, _stack: tuple[Path, ...] = ()) -> tuple[Tree, Origins]:
    """The merged tree of a YAML file and its bases, and the file that each key came from."""
    path = Path(path)
    if path.resolve() in _stack:
        raise UserError(f"{path}: `base:` goes round in a circle")
    own = _read(path)
    bases = own.pop("base", [])
    tree: Tree = {}
    origins: Origins = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_tree, base_origins = read_tree(path.parent / base, (*_stack, path.resolve()))
        _merge(tree, base_tree, {}, str(base))
        origins.update(base_origins)
    _merge(tree, own, origins, str(path))
    return tree, origins


def apply_overrides(tree: Tree, origins: Origins, overrides: Sequence[str]) -> None:
    """Apply `a.b=value` in place; the value is YAML, so numbers, lists and null work."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"cannot read the override {override!r}: expected key=value, e.g. training.batch=64")
        try:
            value = _scalar(yaml.load(text, Loader=_Loader))
        except yaml.YAMLError:
            raise UserError(f"cannot read the value of the override {override!r}: not valid YAML") from None
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _merge(tree, nested, origins, "command line")


def _place(origins: Origins, at: tuple[str, ...]) -> str:
    while at:
        if at in origins:
            return origins[at] + ": "
        at = at[:-1]
    return ""


def _kind_of(field: FieldInfo) -> Registry[Any, Any] | None:
    return next((m.registry for m in field.metadata if isinstance(m, Kind)), None)


def _schema_at(schema: type[StrictConfig], path: tuple[str, ...]) -> type[StrictConfig] | None:
    for part in path:
        field = schema.model_fields.get(part)
        if field is None:
            return None
        options = [field.annotation, *get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, StrictConfig)]
        if not inner:
            return None
        schema = inner[0]
    return schema


def _describe(error: ErrorDetails, schema: type[StrictConfig], at: tuple[str, ...]) -> str:
    names = tuple(str(part) for part in error["loc"] if part not in (_ONE, _MANY))
    key = ".".join((*at, *names))
    if error["type"] == "extra_forbidden":
        parent = _schema_at(schema, names[:-1])
        known = list(parent.model_fields) if parent else []
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        if near:
            return f"{key}: unknown key, did you mean {near[0]!r}?"
        return f"{key}: unknown key (known here: {', '.join(known)})"
    if error["type"] == "missing":
        return f"{key}: required and not given"
    message = error["msg"].removeprefix("Value error, ")
    if not names:
        return f"{'.'.join(at)}: {message}" if at else message
    return f"{key}: {message}" if isinstance(error["input"], dict) else f"{key}: {message}, got {error['input']!r}"


def _validate(schema: type[C], tree: Any, origins: Origins, problems: list[str], at: tuple[str, ...] = ()) -> C | None:
    before = len(problems)
    tree = dict(tree) if isinstance(tree, dict) else tree
    for name, field in schema.model_fields.items():
        registry = _kind_of(field)
        section = tree.get(name) if isinstance(tree, dict) else None
        if registry is None or section is None:
            continue
        where = (*at, name)
        if not isinstance(section, dict) or "kind" not in section:
            known = ", ".join(registry.kinds())
            problems.append(f"{_place(origins, where)}{'.'.join(where)}: needs a `kind` (one of {known})")
            continue
        try:
            section_schema = registry.schema(section["kind"])
        except UserError as error:
            problems.append(f"{_place(origins, (*where, 'kind'))}{'.'.join(where)}.kind: {error}")
            continue
        tree[name] = _validate(section_schema, section, origins, problems, where)
    failed = {
        n
        for n, f in schema.model_fields.items()
        if _kind_of(f) and isinstance(tree, dict) and n in tree and not isinstance(tree[n], StrictConfig)
    }
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        for item in error.errors():
            if item["loc"] and item["loc"][0] in failed:
                continue
            place = _place(origins, (*at, *(str(part) for part in item["loc"])))
            problems.append(place + _describe(item, schema, at))
        if len(problems) == before:
            raise
        return None


def load_config(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read, merge, override and validate; a UserError lists every problem with its file and key."""
    tree, origins = read_tree(path)
    apply_overrides(tree, origins, overrides)
    return parse_config(schema, tree, origins)


def parse_config(schema: type[C], tree: Tree, origins: Origins | None = None, *, where: str = "") -> C:
    """Validate a tree that is already in memory (a saved config.json, say); `where` opens each line of an error."""
    problems: list[str] = []
    config = _validate(schema, tree, origins or {}, problems)
    if problems or config is None:
        raise UserError("\n".join(f"{where}: {line}" if where else line for line in problems))
    return config


def parse_kind(registry: Registry[M, C], tree: Tree, where: str) -> C:
    """Validate one section whose schema is chosen by its `kind`; `where` names its file in messages."""
    kind = tree.get("kind")
    if kind is None:
        raise UserError(f"{where}: no `kind`, so this is not the config of a letit_dist {registry.noun}")
    return parse_config(registry.schema(kind), tree, where=where)


def as_tree(config: StrictConfig) -> Tree:
    """Plain dicts, lists and scalars, as they are saved."""
    return json.loads(config.model_dump_json())


def to_yaml(config: StrictConfig) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def differences(old: Tree, new: Tree, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf that differs."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        at = f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, at + ".")
        elif a != b:
            lines.append(f"{at}: {a!r} -> {b!r}")
    return lines
