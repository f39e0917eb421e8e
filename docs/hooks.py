"""What the documentation takes from the package and from runs: methods' pages, answers; for mkdocs, pictures."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from hf_soo.engine.preconditioner import Method
from hf_soo.optimizers.bases import BASES
from hf_soo.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "results" / "evidence" / "curves.png"


def methods_table(prefix: str) -> str:
    """The table of methods, as README and "Which optimizer" show it.

    Args:
        prefix: what leads from the page to the folder of the methods' pages.
    """
    rows = ["| name | method | default base | learns from |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        base = "itself" if method.base == name else f"`{method.base}`"
        rows.append(f"| [`{name}`]({prefix}{name}.md) | {method.title} | {base} | {_needs(method)} |")
    return "\n".join(rows)


def _needs(method: Method) -> str:
    return "-" if method.config is None else method.make(method.config()).recorder.needs


def method_page(method: Method) -> str:
    """A method's page: its file's head, and its settings with their defaults.

    Args:
        method: a row of the registry.
    """
    made = BASES[method.name].cls if method.config is None else method.make
    own = f"hf_soo.preconditioners.{method.name}"  # its file may have no class of its own
    module = sys.modules[own if own in sys.modules and method.config is not None else made.__module__]
    ours = module.__name__.startswith("hf_soo.")
    head = inspect.getdoc(module) or "" if ours else f"torch's `{made.__name__}`."
    title, _, rest = head.partition("\n")
    page = [f"# `{method.name}`", method.title + ".", title, _as_markdown(rest.strip())]
    page.append(f"Default base: `{method.base}`." if method.base != method.name else "It steps by itself.")
    if method.config is not None:
        page += ["## Settings", _settings(method.config)]
    if ours:
        page.append(f"Code: `{module.__name__.replace('.', '/')}.py`.")
    return "\n\n".join(part for part in page if part) + "\n"


def _as_markdown(docstring: str) -> str:
    """A module's head: its table of symbols as it stands, each deviation a paragraph."""
    rule = r"^=+(?: =+)+$"
    text = re.sub(
        rf"({rule}\n.*?\n{rule}\n.*?\n{rule})", r"```text\n\1\n```", docstring, flags=re.MULTILINE | re.DOTALL
    )
    return re.sub(r"\n(Deviation:)", r"\n\n\1", text).replace("\n\n\n", "\n\n").replace("``` `", "```")


def _settings(config: type[Any]) -> str:
    """The fields of a Config, with the defaults and what its docstrings, and its parents', say of them."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        args = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(cls.__doc__ or ""), re.DOTALL)
        for name, text in re.findall(r"^ +(\w+): (.*(?:\n {5,}.*)*)", args[1], re.MULTILINE) if args else ():
            texts[name] = " ".join(text.split()).replace("|", "\\|")
    rows = ["| setting | default | |", "|---|---|---|"]
    rows += [f"| `{f.name}` | `{f.default!r}` | {texts.get(f.name, '')} |" for f in dataclasses.fields(config)]
    return "\n".join(rows)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that pages show from ``results``."""
    from mkdocs.structure.files import File

    for picture in sorted(ROOT.glob("results/*/*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """On a forge pages reach ``results`` over the folder's edge; in the site there is no edge."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+(results/[^)]*\.png)\)", lambda found: f"]({up}{found[1]})", markdown)


def beside(name: str) -> Any:
    """A module that lies beside this file."""
    sys.path.insert(0, str(ROOT / "docs"))
    module = importlib.import_module(name)
    sys.path.remove(str(ROOT / "docs"))
    return module


def evidence() -> tuple[Any, Any]:
    """The module of answers, and the runs that they are about."""
    answers = beside("answers")
    return answers, answers.Evidence.read(ROOT / "results" / "evidence", ROOT / "configs" / "workloads")


def written() -> dict[Path, str]:
    """What ``python docs/hooks.py`` writes: pages out of the registry and out of runs, and tables in other pages."""
    pages = {ROOT / "docs" / "methods" / f"{name}.md": method_page(method) for name, method in METHODS.items()}
    answers, runs = evidence()
    pages[ROOT / "docs" / "guides" / "which_optimizer.md"] = answers.page(runs)
    for file, name, table in (
        ("README.md", "methods", methods_table("docs/methods/")),
        ("docs/methods/index.md", "methods", methods_table("")),
        ("docs/guides/when_it_does_not_help.md", "not better", beside("in_vain").not_better(runs)),
    ):
        text = (ROOT / file).read_text(encoding="utf-8")
        head, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        pages[ROOT / file] = f"{head}{start}{table}\n{end}{tail}"
    return pages


def draw() -> None:
    """The picture of all runs, with the digest of what it shows, where that is not the one it carries."""
    from hf_soo.search.picture import figure

    answers, runs = evidence()
    if answers.digest_in(PICTURE) != answers.digest(runs):
        figure(runs.trials, "", runs.documents).savefig(PICTURE, dpi=80, metadata={"Source": answers.digest(runs)})


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
    draw()
