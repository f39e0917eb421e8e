"""What a comparison refuses to rank, and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from hf_soo.runs.record import RunRecord
from hf_soo.search.claims import Claim, Claims, claims
from hf_soo.search.groups import groups
from tests.search.trials import BUDGET, START, chosen, confirmed, trial

MUON, MKOR = [1.80, 1.83, 1.81, 1.853], [1.77, 1.79, 1.79, 1.801]
RATES: dict[float, float | str] = {0.01: 1.9, 0.02: 1.8, 0.04: 1.9}


def claims_of(trials: Sequence[RunRecord]) -> Claims:
    (group,) = groups(trials, ("confirm",))
    return claims(group, trials)


def row(found: Claims, method: str) -> Claim:
    return next(each for each in found.rows if each.setting.method == method)


def fair() -> list[RunRecord]:
    tuned = [run for method in ("muon", "mkor_muon") for run in chosen(method, RATES)]
    return [*tuned, *confirmed("muon", MUON), *confirmed("mkor_muon", MKOR)]


def confirming(trials: Sequence[RunRecord], method: str = "mkor_muon") -> list[RunRecord]:
    return [run for run in trials if run.search["space"] == method and run.search["stage"] == "confirm"]


def reached(final: float, target: float) -> float:
    """The step at which a made-up curve comes down to `target`, linearly between its evaluations, by numpy."""
    steps = np.arange(25, BUDGET + 1, 25)
    losses = final + (START - final) * (np.exp(-steps / 40) - np.exp(-BUDGET / 40))
    return float(np.interp(-target, -losses, steps))


def test_a_fair_comparison() -> None:
    found = claims_of(fair())
    ours, base = row(found, "mkor_muon"), row(found, "muon")
    differences = np.subtract(MKOR, MUON)
    assert ours.reasons == base.reasons == () and found.comparisons == 1 and found.baseline is base.setting
    assert ours.difference is not None and ours.reached is not None
    assert ours.difference.mean == pytest.approx(differences.mean())
    assert ours.difference.error == pytest.approx(differences.std(ddof=1) / 2)
    assert ours.p == pytest.approx(stats.ttest_1samp(differences, 0, alternative="less").pvalue)
    steps = np.mean([reached(mine, target) for mine, target in zip(MKOR, MUON, strict=True)])
    assert ours.reached.steps == pytest.approx(steps) and ours.reached.seconds == pytest.approx(steps / 2)
    assert ours.ratio == pytest.approx(steps / BUDGET) and 0.5 < ours.ratio < 0.9
    assert base.p is None and base.difference is None and base.ratio == 1.0


def test_the_baseline_is_the_best_plain_method_and_each_method_meets_its_own_base() -> None:
    trials = fair()
    for method, losses in (("adamw", [2.6, 2.7, 2.6, 2.7]), ("mkor_adamw", [2.4, 2.4, 2.41, 2.5])):
        trials += [*chosen(method, RATES), *confirmed(method, losses)]
    found = claims_of(trials)
    assert [claim.setting.method for claim in found.rows] == ["mkor_muon", "muon", "mkor_adamw", "adamw"]
    assert found.baseline is not None and found.baseline.method == "muon"
    (own,) = found.over_own_base
    assert (own.setting.method, own.baseline and own.baseline.method) == ("mkor_adamw", "adamw")
    assert own.difference is not None and own.difference.mean == pytest.approx(np.mean([2.4, 2.4, 2.41, 2.5]) - 2.65)
    assert row(found, "adamw").difference is not None and row(found, "adamw").p is None
    assert found.comparisons == 4  # two against each plain method, the own base among them: all in one adjustment
    tested = [claim for name in ("adamw", "muon") for claim in found.beside[name] if claim.p is not None]
    assert sorted(claim.setting.method for claim in tested) == ["mkor_adamw", "mkor_adamw", "mkor_muon", "mkor_muon"]
    assert own in tested and row(found, "mkor_muon") in tested
    lower = np.array([claim.p for claim in tested], dtype=float)
    for p, adjusted in ((lower, [claim.adjusted for claim in tested]), (1 - lower, [claim.higher for claim in tested])):
        order = np.argsort(p)
        scaled = np.minimum(1, np.maximum.accumulate(p[order] * [4, 3, 2, 1]))
        np.testing.assert_allclose(np.array(adjusted, dtype=float)[order], scaled)


def unequal_trials(trials: list[RunRecord]) -> None:
    trials += chosen("mkor_muon", {0.03: 1.85}, "narrow")


def one_seed(trials: list[RunRecord]) -> None:
    for run in confirming(trials)[1:]:
        trials.remove(run)


def other_code(trials: list[RunRecord]) -> None:
    for run in confirming(trials):
        run.code = "beef"


def no_code(trials: list[RunRecord]) -> None:
    for run in confirming(trials):
        run.code = ""


def missing_pair(trials: list[RunRecord]) -> None:
    trials.remove(confirming(trials)[-1])


def other_weights(trials: list[RunRecord]) -> None:
    confirming(trials)[1].config["initial_weights"] = "others"


def no_weights(trials: list[RunRecord]) -> None:
    del confirming(trials)[1].config["initial_weights"]


def diverged(trials: list[RunRecord]) -> None:
    run = confirming(trials)[3]
    trials[trials.index(run)] = trial("mkor_muon", "confirm", run.seed, 1.8, status="diverged")


def unfinished(trials: list[RunRecord]) -> None:
    for run in confirming(trials):
        run.search |= {"trials": 6}


def tuning_unfinished(trials: list[RunRecord]) -> None:
    for run in trials:
        if run.search["stage"] == "wide":
            run.search["trials"] = 4 if run.search["space"] == "mkor_muon" else 3


def twice(trials: list[RunRecord]) -> None:
    trials += confirmed("mkor_muon", [1.7], first=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unequal_trials, "tuned with 3 + 1 trials, muon with 3 + 0"),
        (one_seed, "one seed; no pair for seed 3, 4, 5"),
        (other_code, "code beef, muon's c0de"),
        (no_code, "code not recorded"),
        (missing_pair, "no pair for seed 5"),
        (other_weights, "other initial weights at seed 3"),
        (no_weights, "initial weights not recorded"),
        (diverged, "1 of 4 diverged"),
        (unfinished, "4 of 6 runs done"),
        (tuning_unfinished, "3 of 4 wide trials done"),
        (twice, "seed 4 ran more than once"),
    ],
)
def test_what_is_not_ranked(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    trials = fair()
    change(trials)
    found = claims_of(trials)
    ours = row(found, "mkor_muon")
    assert "; ".join(ours.reasons) == reason
    assert ours.p is None and ours.adjusted is None and found.comparisons == 0
    assert found.rows[-1] is ours, "what is not ranked stands last, however low its loss"
    assert ours.setting.loss is not None and ours.setting.loss < 1.83, "it is shown all the same"


def test_seeds_of_one_side_alone_do_not_count() -> None:
    trials = fair()
    before = row(claims_of(trials), "mkor_muon")
    trials += confirmed("muon", [1.2, 1.3], first=6)  # lower: its mean is no part of the difference
    after = row(claims_of(trials), "mkor_muon")
    assert after.baseline is not None and len(after.baseline.losses) == 6
    assert after.difference == before.difference and after.p == before.p and not after.reasons
    trials += confirmed("mkor_muon", [1.7], first=9)
    more = row(claims_of(trials), "mkor_muon")
    assert more.difference == before.difference and more.p == before.p and not more.reasons
    assert more.steps == before.steps


def test_what_may_be_said_follows_from_both_sides_of_the_test() -> None:
    losses = {
        "mkor_muon": [each - 0.03 - 0.001 * n for n, each in enumerate(MUON)],
        "eva_muon": [each + 0.03 + 0.001 * n for n, each in enumerate(MUON)],
        "foof_muon": [1.79, 1.84, 1.80, 1.86],
    }
    trials = [run for method in ("muon", *losses) for run in chosen(method, RATES)]
    trials += [*confirmed("muon", MUON), *(run for method in losses for run in confirmed(method, losses[method]))]
    found = claims_of(trials)
    said = {method: row(found, method).verdict for method in ("muon", *losses)}
    assert said == {"muon": "baseline", "mkor_muon": "fewer", "eva_muon": "more", "foof_muon": "not shown"}
    for method in ("mkor_muon", "eva_muon"):
        ours, steps = losses[method], row(found, method).steps
        took = [
            reached(mine, max(mine, base)) / reached(base, max(mine, base))
            for mine, base in zip(ours, MUON, strict=True)
        ]
        assert steps is not None and steps.mean == pytest.approx(np.mean(took))
        assert steps.error == pytest.approx(np.std(took, ddof=1) / 2) and (steps.mean < 1) == (method == "mkor_muon")
    few = [run for run in trials if run.search["stage"] == "wide" or run.seed < 5]
    assert row(claims_of(few), "mkor_muon").verdict == "not shown", "three seeds make no claim"
    assert row(claims_of([*trials, *confirmed("lamb", [2.7])]), "lamb").verdict == "not ranked"


def test_what_one_batch_was_tuned_with_counts_for_no_other() -> None:
    trials = fair()
    for run in trials:
        run.config["per_device_train_batch_size"] = 64
    more = [run for run in chosen("mkor_muon", RATES, config={"per_device_train_batch_size": 256})]
    assert row(claims_of([*trials, *more]), "mkor_muon").reasons == ()
    large = [*confirmed("mkor_muon", MKOR), *confirmed("muon", MUON)]
    for run in large:
        run.config |= {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 4, "max_steps": 75}
    small, big = groups([*trials, *large], ("confirm",))
    assert (small.batch, big.batch, small.family == big.family) == (64, 256, True)
    reasons = [
        claim.reasons for claim in claims(big, [*trials, *large, *more]).rows if claim.setting.method == "mkor_muon"
    ]
    assert reasons == [("tuned with 3 + 0 trials, muon with 0 + 0",)]


def test_a_plain_method_that_is_not_whole_is_no_baseline() -> None:
    trials = fair()
    trials += [*chosen("lamb", RATES), *confirmed("lamb", [1.5])]
    found = claims_of(trials)
    assert found.baseline is not None and found.baseline.method == "muon"
    assert row(found, "lamb").reasons[0] == "one seed"


def test_without_a_baseline_nothing_is_ranked() -> None:
    found = claims_of([run for run in fair() if run.search["space"] != "muon"])
    assert found.baseline is None and [each.reasons for each in found.rows] == [("no baseline",)]


def test_a_target_that_is_not_reached_by_all_has_no_ratio() -> None:
    trials = [*fair(), *chosen("eva_muon", RATES), *confirmed("eva_muon", [1.79, 1.84, 1.80, 1.86])]
    ours = row(claims_of(trials), "eva_muon")
    assert ours.reached is not None and (ours.reached.count, ours.reached.of) == (2, 4) and ours.ratio is None
    assert ours.reached.steps == pytest.approx(np.mean([reached(1.79, 1.80), reached(1.80, 1.81)]))
    none = row(claims_of([*fair(), *chosen("eva_muon", RATES), *confirmed("eva_muon", [2.0] * 4)]), "eva_muon")
    assert none.reached is not None and (none.reached.count, none.reached.steps, none.ratio) == (0, None, None)


def test_groups_differ_in_what_must_be_equal_and_not_in_what_is_searched() -> None:
    trials = fair()
    for run in confirming(trials):
        run.config["warmup_steps"] = 0.1
    assert len(groups(trials, ("confirm",))) == 2
    for run in trials:
        run.search["params"] = run.search["params"] | {"warmup_steps": run.config.get("warmup_steps", 0.0)}
    assert len(groups(trials, ("confirm",))) == 1
    for run in confirming(trials, "muon"):
        run.config["max_steps"] = 600
    assert [group.budget for group in groups(trials, ("confirm",))] == [600, 300]
    for run in confirming(trials, "muon"):
        run.config |= {"max_steps": 300, "data": {"held_out": "choose"}}
    assert {group.held_out for group in groups(trials, ("confirm",))} == {"choose", "claim"}
    for run in confirming(trials, "muon"):
        run.config |= {"data": {"held_out": "claim"}, "model": {"hidden_size": 64}}
    assert [group.differs for group in groups(trials, ("confirm",))] == ["", "model.hidden_size=128"]
