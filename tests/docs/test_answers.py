"""The sentences of "Which optimizer should I use?" follow from runs by rule: here from made-up ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hf_soo.search.claims import Claim
from tests.docs.test_documentation import hooks
from tests.search.test_claims import MUON, claims_of
from tests.search.test_overview import BETTER, WORSE, bench, workload
from tests.search.trials import write

ADAMW = [2.6, 2.7, 2.64, 2.711]
OVER_ADAMW = [loss - 0.2 - 0.001 * n for n, loss in enumerate(ADAMW)]


@pytest.fixture(scope="module")
def answers() -> Any:
    return hooks().evidence()[0]


@pytest.fixture(scope="module")
def evidence(answers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    methods = {"muon": MUON, "mkor_muon": BETTER, "mkor_muon_momentum": WORSE, "adamw": ADAMW, "mkor_adamw": OVER_ADAMW}
    write(workload("gpt", 64, **methods, newton_muon=[1.79, 1.84, 1.80, 1.86]), folder / "evidence" / "gpt")
    write(workload("gpt_16", 16, muon=MUON, mkor_muon=WORSE[:1]), folder / "evidence" / "gpt_16")
    write(workload("vit", None, muon=[], soap_muon=[]), folder / "evidence" / "vit")
    bench(folder / "bench", "large", 32, {("muon", "muon"): 2.0, ("mkor", "muon"): 2.1})
    (folder / "recipes").mkdir()
    for name in ("gpt", "gpt_embedded", "vit", "glue"):
        (folder / "recipes" / f"{name}.yaml").touch()
    return answers.Evidence.read(folder / "evidence", folder / "recipes")


def parts(page: str) -> dict[str, str]:
    """The text below each heading."""
    found = re.split(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return dict(zip(found[1::2], (text.strip() for text in found[2::2]), strict=True))


def lines(text: str) -> dict[str, str]:
    """The bold beginnings of a list, and what follows."""
    return {head: said.strip() for head, said in re.findall(r"^- \*\*(.*?)\*\*:? (.*)$", text, re.MULTILINE)}


def test_each_sentence_has_its_numbers(answers: Any, evidence: Any) -> None:
    gpt = parts(answers.page(evidence))["gpt: 300 steps, 64 examples a step"]
    found = lines(gpt)
    ours = next(claim for claim in claims_of(gpt_trials(evidence)).rows if is_of(claim, "mkor_muon"))
    assert ours.steps is not None and ours.difference is not None and ours.adjusted is not None
    share, error = 100 * (1 - ours.steps.mean), 100 * ours.steps.error
    difference = f"{ours.difference.mean:+.4f} ± {ours.difference.error:.4f} over 4 seeds"
    p = "< 0.0001" if ours.adjusted < 1e-4 else f"= {ours.adjusted:.4f}"
    assert found["MKOR over Muon, beside Muon"] == (
        f"`mkor_muon` at 0.02 **needs {share:.1f} % ± {error:.1f} fewer steps** than `muon` at 0.02 "
        f"(loss {ours.setting.loss:.3f} against 1.823, {difference}, p (Holm) {p}). "
        "A step takes 1.05 of its seconds (large, 32 x 64 tokens): "
        f"{1.05 * ours.steps.mean:.2f} of its seconds to the same loss."
    )
    assert gpt.startswith(
        "Take `mkor_muon` at 0.02: it needs fewer steps than `muon` at 0.02, the strongest plain method."
    )
    assert found["MKOR over AdamW, beside AdamW"].startswith("`mkor_adamw` at 0.02 **needs ")
    assert found["MKOR over AdamW, beside AdamW"].endswith("What a step of it costs beside that was not measured.")
    assert found["Any form of MKOR, beside AdamW"].startswith("`mkor_muon` at 0.02 **needs ")
    assert found["MKOR over LAMB, beside LAMB"] == "`lamb` is not run yet."
    assert found["Another method"].startswith(
        "`newton_muon` at 0.02: **no difference shown** to `muon` at 0.02 (loss 1.823"
    )
    assert found["The best form of MKOR"].startswith(
        f"`mkor_muon` at 0.02 has the lowest loss, {ours.setting.loss:.3f}; beside it"
    )


def gpt_trials(evidence: Any) -> list[Any]:
    return [run for run in evidence.trials if run.search["study"] == "gpt"]


def is_of(claim: Claim, method: str) -> bool:
    return claim.setting.method == method


def test_what_was_not_run_is_said(answers: Any, evidence: Any) -> None:
    found = parts(answers.page(evidence))
    assert found["Not run yet"] == "`glue`." and "gpt_embedded" not in answers.page(evidence)
    assert found["vit"] == "Tuned, but not confirmed yet: `muon`, `soap_muon`."
    small = found["gpt_16: 300 steps, 16 examples a step"]
    assert small.startswith("Take `muon` at 0.02, the strongest plain method: no other could be tested beside it yet.")
    assert "was run, but cannot be compared yet: one seed; no pair for seed 3, 4, 5." in small
    short = found["In short"]
    assert "than the strongest plain method: 1 of the 1\nwhere both can be ranked (gpt: 300 steps)." in short
    assert "| glue | not run yet | not run yet |" in short and "| vit | tuned, but not confirmed yet |" in short
    assert "| 16 (gpt_16) | 64 (gpt) |" in found["At which batch"]
    empty = answers.Evidence([], [], [], ["gpt"])
    assert (
        parts(answers.page(empty))["Not run yet"] == "`gpt`."
        and hooks().beside("in_vain").not_better(empty) == "Nothing: not run yet."
    )


def test_more_steps_are_said_and_stand_among_what_does_not_help(answers: Any, evidence: Any) -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in hooks().beside("in_vain").not_better(evidence).splitlines()[2:]
    ]
    said = {(row[0], row[1], row[2]): row[-1] for row in rows}
    muon = "`muon` at 0.02"
    assert said == {
        ("gpt: 300 steps", "`mkor_muon_momentum` at 0.02", muon): "needs more steps",
        ("gpt: 300 steps", "`mkor_adamw` at 0.02", muon): "needs more steps",
        ("gpt: 300 steps", "`newton_muon` at 0.02", muon): "no difference shown",
        ("gpt_16: 300 steps", "`mkor_muon` at 0.02", muon): "one seed; no pair for seed 3, 4, 5",
        ("vit: 300 steps", "`soap_muon` at 0.02", muon): "tuned, but not confirmed yet",
    }
    worse = next(claim for claim in claims_of(gpt_trials(evidence)).rows if is_of(claim, "mkor_muon_momentum"))
    assert worse.steps is not None and worse.verdict == "more"
    assert f"**needs {100 * (worse.steps.mean - 1):.1f} % ± " in answers.sentence(
        worse, []
    ) and "more steps**" in answers.sentence(worse, [])
    (numbers,) = [row for row in rows if row[1] == "`mkor_muon_momentum` at 0.02"]
    assert numbers[3].startswith("+") and numbers[4].startswith("+0.03") and numbers[5:7] == ["4", "1.0000"]


def test_published_claims_are_held_against_runs(answers: Any, evidence: Any) -> None:
    table = parts(answers.page(evidence))["Published claims, and these runs"]
    rows = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in table.splitlines() if line.startswith("| ")
    }
    assert rows["MKOR"] == rows["Eva"] == rows["K-FAC reduce"] == "not run yet"
    assert rows["Newton-Muon"].startswith("gpt: 300 steps: **not shown** (`newton_muon` at 0.02: ")
    ((group, claims),) = evidence.of("gpt")
    verdicts = {}
    for share, of in ((0.99, "steps"), (0.01, "steps"), (0.99, "seconds"), (0.01, "seconds")):
        each = answers.Published("", "", "mkor", "muon", "muon", share, of)
        verdicts[share, of] = re.search(r"\*\*(.*?)[,*]", answers._held(each, group, claims, evidence.documents))[1]  # type: ignore[index]
    assert verdicts == {
        (0.99, "steps"): "holds", (0.01, "steps"): "a smaller gain",
        (0.99, "seconds"): "holds", (0.01, "seconds"): "a smaller gain",
    }  # fmt: skip
    over_adamw = answers.Published("", "", "mkor", "adamw", "adamw", 0.9, "seconds")
    assert "**fewer steps, and seconds that were not measured**" in answers._held(
        over_adamw, group, claims, evidence.documents
    )
    assert "**does not hold**" in answers._held(over_adamw._replace(over="muon"), group, claims, evidence.documents)


def test_another_base_is_said(answers: Any, evidence: Any) -> None:
    claim = next(claim for claim in claims_of(gpt_trials(evidence)).rows if is_of(claim, "mkor_muon"))
    assert "Its base" not in answers.sentence(claim, [])
    run = claim.setting.runs[0]
    run.config["base_optim_args"] = {"rest_lr": 0.01, "ns_steps": 6, "ns_coefficients": "polar_express"}
    said = answers.sentence(claim, [])
    del run.config["base_optim_args"]
    assert "Its base has other settings (ns_coefficients polar_express, ns_steps 6): part of" in said


def test_a_picture_says_what_it_is_of(answers: Any, evidence: Any, tmp_path: Path) -> None:
    assert answers.digest_in(tmp_path / "none.png") == ""
    (tmp_path / "a.png").write_bytes(b"\x89PNG tEXtSource\x00" + answers.digest(evidence).encode() + b"rest")
    assert answers.digest_in(tmp_path / "a.png") == answers.digest(evidence)
    assert answers.digest(evidence._replace(trials=evidence.trials[1:])) != answers.digest(evidence)
