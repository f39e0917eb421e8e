"""Recipes: YAML files of settings, read one over the other.

A file may build on another one of its folder (``extends: FILE``). A workload says under ``for:`` what depends on the
optimizer too, by the names of the optimizers' files beside it:

    extends: bert_phase1.yaml
    output_dir: out/bert_base/phase1_{optimizer}
    for:
      adamw: {learning_rate: 0.0004}
      mkor: {learning_rate: 0.003}

Given with mkor.yaml, in either order, its settings for ``mkor`` come right after both files, and ``{optimizer}`` is
``mkor``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# What a recipe's `task` may be, and the command of hf-soo that trains it.
COMMANDS = {"bert": "pretrain", "lm": "pretrain", "glue": "glue", "squad": "squad", "vision": "vision"}
_NAME = "{optimizer}"


class _Recipe(NamedTuple):
    settings: dict[str, Any]
    cases: dict[str, dict[str, Any]]  # the settings for each optimizer


def read_recipe(
    files: Sequence[str | Path], known: Collection[str] | None = None, flags: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that files give together; a later file wins.

    Args:
        files: YAML files, each one mapping.
        known: the keys there are; None: any.
        flags: keys whose values are given elsewhere.

    Raises:
        ValueError: a file that cannot be read or is no mapping, an unknown key or one given twice, files that extend
            each other, an optimizer under ``for:`` without a file, two of them given, or none and its settings missing.
    """
    names = [Path(file).stem for file in files]
    recipes = [_read(Path(file), known, names) for file in files]
    settings: dict[str, Any] = {}
    for last, recipe in enumerate(recipes):
        settings |= recipe.settings
        for earlier in recipes[:last]:
            settings |= earlier.cases.get(names[last], {})
        for name in names[: last + 1]:
            settings |= recipe.cases.get(name, {})
    optimizers = {name for recipe in recipes for name in recipe.cases}
    chosen = [name for name in names if name in optimizers]
    if len(chosen) > 1:
        raise ValueError(f"--config {chosen[0]} and --config {chosen[1]} are two optimizers; give one.")
    if chosen:
        return {key: value.replace(_NAME, chosen[0]) if _is_open(value) else value for key, value in settings.items()}
    # no optimizer's file: what each of them has, the command line must have
    always = set[str]().union(*(set.intersection(*map(set, each.cases.values())) for each in recipes if each.cases))
    missing = {key for key in always if key not in settings} | {key for key in settings if _is_open(settings[key])}
    if missing := missing.difference(flags):
        raise ValueError(
            f"--config {' '.join(map(str, files))}: no {' and no '.join(sorted(missing))} without an optimizer's file; "
            f"give --config {'|'.join(sorted(optimizers)) or 'OPTIMIZER'}.yaml as well, or these by flags."
        )
    return settings


def optimizer_names(file: str | Path) -> list[str]:
    """The optimizers that a workload has settings for.

    Raises:
        ValueError: as `read_recipe`.
    """
    return sorted(_read(Path(file), None, ()).cases)


def values_of(key: str, files: Sequence[str | Path]) -> list[Any]:
    """What each file says of a key itself, or what it extends; None where it says nothing.

    Args:
        key: of the settings, not of those under ``for:``.
        files: YAML files.

    Raises:
        ValueError: as `read_recipe`.
    """
    names = [Path(file).stem for file in files]
    return [_read(Path(file), None, names).settings.get(key) for file in files]


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and _NAME in value


def _read(file: Path, known: Collection[str] | None, given: Collection[str], above: tuple[Path, ...] = ()) -> _Recipe:
    """A file over what it extends.

    Args:
        file: to read.
        known: the keys there are.
        given: names of the files that are given together.
        above: the files that extend it.

    Raises:
        ValueError: as `read_recipe`.
    """
    if file.resolve() in {path.resolve() for path in above}:
        raise ValueError(f"--config {above[0]}: extends itself: {' -> '.join(map(str, (*above, file)))}.")
    settings = _load(file)
    base, cases = settings.pop("extends", None), settings.pop("for", {})
    if not isinstance(base, str | None):
        raise ValueError(f"--config {file}: extends={base!r} must be the name of one file.")
    if not isinstance(cases, dict) or not all(isinstance(case, dict) for case in cases.values()):
        raise ValueError(f"--config {file}: 'for' must hold 'optimizer: {{key: value}}' lines.")
    for key in (key for part in (settings, *cases.values()) for key in part):
        if known is not None and key not in known:
            raise ValueError(f"--config {file}: {unknown_name('key', str(key), known)}")
    below = _Recipe({}, {}) if base is None else _read(file.parent / base, known, given, (*above, file))
    for name in cases:
        own = file.with_name(f"{name}.yaml")
        if name not in below.cases and name not in given and not own.is_file():
            raise ValueError(f"--config {file}: 'for' has {name!r}, an unknown optimizer; there is no {own}.")
    both = {name: below.cases.get(name, {}) | cases.get(name, {}) for name in {**below.cases, **cases}}
    return _Recipe(below.settings | settings, both)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which `yaml` would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key in (self.construct_object(each, deep=True) for each, _ in node.value):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {file}: holds a {type(content).__name__}, not 'key: value' lines.")
    return content


def unknown_name(kind: str, got: str, known: Iterable[str]) -> str:
    """What is said of a name of a kind that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f"unknown {kind} {got!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists every flag.")
