"""The recipes that come with hf_soo, ``configs/`` of a checkout, packed into a wheel: found by name, listed, copied.

A name is the end of a file's path, with or without its suffix: ``bert_large_phase2``, ``pretrain/mkor``,
``configs/pretrain/mkor.yaml``. What stands in several folders is looked for beside the recipe that is given before it,
then in the folder of the command: ``hf-soo glue --config minilm_adamw`` is glue/minilm_adamw, and after
``--config smoke/mkor`` lamb is smoke/lamb.
"""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from hf_soo.outputs import folder_to_write

_PACKAGE = Path(__file__).resolve().parents[1]
_NO_RUNS = ("accelerate", "deepspeed", "lora", "search", "slurm")  # folders of what no command trains from
_WIDTH = 120


def folder() -> Path:
    """``configs/``: in the package of a wheel; in a checkout and an editable install beside it."""
    packed = _PACKAGE / "configs"
    return packed if packed.is_dir() else _PACKAGE.parent / "configs"


def find(names: Sequence[str | Path], place: str = "") -> list[Path]:
    """The files of recipes; each name is a path that exists, or that of a shipped one.

    Args:
        names: as they are given.
        place: folder of the command, whose file is meant where several have the name; "search" means its files alone,
            and another one recipes of runs alone; "": any file.

    Raises:
        ValueError: no such file and no recipe of that name, or several.
    """
    found: list[Path] = []
    for name in map(Path, names):
        there = name.exists() and not name.is_dir()
        found.append(name if there else _find(name, place, found[-1].parent if found else None))
    return found


def _find(name: Path, place: str, near: Path | None) -> Path:
    """A shipped recipe, or one beside another.

    Args:
        name: without a file of it.
        place: as in `find`.
        near: the folder of the recipe that is given before.

    Raises:
        ValueError: as `find`.
    """
    for beside in (near / name, near / f"{name}.yaml") if near is not None else ():
        if beside.is_file():
            return beside
    if place in _NO_RUNS:
        pool = [file for file in _files() if file.parent.name == place]
    else:
        pool = [file for file in _files() if not place or file.parent.name not in _NO_RUNS]
    alike = [file for file in pool if name.parts in _ends(file, len(name.parts))]
    if len(alike) > 1:
        alike = [file for file in alike if file.parent.name == place] or alike
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise ValueError(f"{str(name)!r} is the name of {' and '.join(map(title, alike))}; give it with its folder.")
    places = set[Path]() if place else {file.parent for file in pool}
    known = [_bare(file).name for file in (*pool, *sorted(places), *sorted(name.parent.glob("*.yaml")))]
    near_by = difflib.get_close_matches(_bare(name).name, known, n=1)
    more = f"did you mean {near_by[0]!r}?" if near_by else "`hf-soo recipes` lists them."
    raise ValueError(f"No file {str(name)!r}, and no recipe of that name; {more}")


def title(file: Path) -> str:
    """A shipped file's name with its folder: "pretrain/mkor"."""
    return _bare(file).relative_to(folder()).as_posix()


def _bare(file: Path) -> Path:
    return file.with_suffix("") if file.suffix == ".yaml" else file


def _files() -> list[Path]:
    return sorted(file for file in folder().rglob("*") if file.is_file())


def _ends(file: Path, length: int) -> tuple[tuple[str, ...], ...]:
    """The last parts of a file's path, and the same without the suffix."""
    whole = file.relative_to(folder().parent)
    return whole.parts[-length:], whole.with_suffix("").parts[-length:]


def listing(place: Path) -> str:
    """A paragraph for each file: its name, what it is, and what its first lines say of the paper and of runs here.

    Args:
        place: `folder`, or one in it; "" comes of any other.
    """
    files = [file for file in _files() if place in file.parents]
    column = max((len(title(file)) for file in files), default=0) + 2
    lines = []
    for file in files:
        comment = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
        text = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines() if line[:2] != "#!")
        what = re.match(r".+?(?=\.(?: |$))", text)
        said = re.findall(r"Paper table: .+?(?= Hardware:)|(?:Expected|Tested:|Cost:).+?\.(?= |$)", text)
        for number, line in enumerate([what[0] if what else "", *said]):
            name = f"{title(file):{column}}" if number == 0 else " " * column
            lines += textwrap.wrap(line, _WIDTH, initial_indent=name, subsequent_indent=" " * (column + 2)) or [name]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def copy(target: str | Path) -> str:
    """All of them into a new folder, as a checkout has them: what names other files by their path finds them there.

    Args:
        target: the folder to make.

    Raises:
        ValueError: it is there already, or cannot be made.
    """
    if Path(target).exists():
        raise ValueError(f"--copy {target} exists; give a folder that is not there yet, configs for example.")
    shutil.copytree(folder(), folder_to_write("--copy", target))
    return f"wrote {target}\n"
