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
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml

from hf_soo.engine.checks import allowed, options, shown

# What a recipe's `task` may be, and the command of hf-soo that trains it.
COMMANDS = {"bert": "pretrain", "lm": "pretrain", "glue": "glue", "squad": "squad", "vision": "vision"}
_NAME = "{optimizer}"


class _Recipe(NamedTuple):
    settings: dict[str, Any]
    cases: dict[str, dict[str, Any]]  # the settings for each optimizer


def read_recipe(
    files: Sequence[str | Path], known: Mapping[str, Any] | None = None, flags: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that files give together; a later file wins.

    Args:
        files: YAML files, each one mapping.
        known: the keys there are, and their types; None: any.
        flags: keys whose values are given elsewhere.

    Raises:
        ValueError: a file that cannot be read or is no mapping, an unknown key or one given twice, a value that is
            none of the key's, files that extend each other, an optimizer under ``for:`` without a file, two of them
            given, or none and its settings missing.
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


def _read(file: Path, known: Mapping[str, Any] | None, given: Collection[str], above: tuple[Path, ...] = ()) -> _Recipe:
    """A file over what it extends.

    Args:
        file: to read.
        known: the keys there are, and their types.
        given: names of the files that are given together.
        above: the files that extend it.

    Raises:
        ValueError: as `read_recipe`.
    """
    if file.resolve() in {path.resolve() for path in above}:
        raise ValueError(f"--config {above[0]}: extends itself: {' -> '.join(map(str, (*above, file)))}.")
    settings = read_mapping(file, "--config")
    base, cases = settings.pop("extends", None), settings.pop("for", {})
    if not isinstance(base, str | None):
        raise ValueError(f"--config {file}: extends={base!r} must be the name of one file.")
    if not isinstance(cases, dict) or not all(isinstance(case, dict) for case in cases.values()):
        raise ValueError(f"--config {file}: 'for' must hold 'optimizer: {{key: value}}' lines.")
    for key, value in (item for part in (settings, *cases.values()) for item in part.items()):
        if known is None:
            break
        if key not in known:
            raise ValueError(f"--config {file}: {unknown_name('key', str(key), known)}")
        if value is not None and not _is_flag(value, known[key]):
            plain = ", no item of which begins with '-'" if isinstance(value, list) else ""
            raise ValueError(
                f"--config {file}: {key}={shown(value)} is not allowed; give {allowed(known[key])}{plain}."
            )
    below = _Recipe({}, {}) if base is None else _read(file.parent / base, known, given, (*above, file))
    for name in cases:
        own = file.with_name(f"{name}.yaml")
        if name not in below.cases and name not in given and not own.is_file():
            raise ValueError(f"--config {file}: 'for' has {name!r}, an unknown optimizer; there is no {own}.")
    both = {name: below.cases.get(name, {}) | cases.get(name, {}) for name in {**below.cases, **cases}}
    return _Recipe(below.settings | settings, both)


def _is_flag(value: Any, hint: Any) -> bool:
    """Whether a value of a file can be that of a flag, whose text is then read as on the command line.

    Args:
        value: as YAML reads it.
        hint: the flag's type.
    """
    if hint is Any:
        return True
    kinds = {get_origin(part) or part for part in options(hint)}
    if isinstance(value, dict):
        return dict in kinds and _is_plain(value)
    if isinstance(value, list):  # an item that begins with "-" would be taken for a flag
        return list in kinds and all(type(each) in {str, int, float} and str(each)[:1] != "-" for each in value)
    return type(value) in {str, int, float} or (isinstance(value, bool) and bool in kinds)


def _is_plain(value: Any) -> bool:
    """Whether JSON has words for it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which `yaml` would take the last, and what copies others."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key in (self.construct_object(each, deep=True) for each, _ in node.value):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """The mapping of one YAML file, in which no key stands twice.

    Args:
        file: to read.
        what: it is, for the message.

    Raises:
        ValueError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a date of month 13; brackets without end
        raise ValueError(f"{what} {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {file}: holds a {type(content).__name__}, not 'key: value' lines.")
    return content


def unknown_name(kind: str, got: str, known: Iterable[str]) -> str:
    """What is said of a name of a kind that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f"unknown {kind} {got!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists every flag.")
