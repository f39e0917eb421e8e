"""The comparison's statistics on synthetic runs: how often nothing is called something, and something is found."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_soo.search.claims import claims
from hf_soo.search.groups import groups
from hf_soo.search.statistics import holm, paired
from tests.search.trials import chosen, confirmed

DRAWS = 2000
LEVEL = 0.01
BETWEEN_SEEDS, WITHIN = 0.03, 0.01  # standard deviations: what a seed does to both methods, and to each


def draws(seeds: int, effect: float) -> np.ndarray:
    """Final losses [draw, method, seed]; `effect` is the second method's, in deviations of the difference."""
    draw = np.random.default_rng([seeds, round(100 * effect)])
    losses = 1.8 + draw.normal(0, BETWEEN_SEEDS, (DRAWS, 1, seeds)) + draw.normal(0, WITHIN, (DRAWS, 2, seeds))
    losses[:, 1] -= effect * WITHIN * np.sqrt(2)
    return losses


def found(losses: np.ndarray) -> float:
    """The share of draws that are called significant."""
    return float(np.mean([paired(list(ours - base)).p < LEVEL for base, ours in losses]))  # type: ignore[operator]


@pytest.mark.parametrize("seeds", [4, 5])
def test_nothing_is_called_something_as_often_as_said(seeds: int) -> None:
    share = found(draws(seeds, 0.0))
    assert 0.005 <= share <= 0.015, f"{share:.2%} of {DRAWS} draws without a difference are significant at 1 %"


@pytest.mark.parametrize("seeds", [4, 5])
@pytest.mark.parametrize("effect", [1.5, 3.0])
def test_a_difference_is_found_as_often_as_the_noncentral_t_says(seeds: int, effect: float) -> None:
    share = found(draws(seeds, effect))
    power = stats.nct.cdf(stats.t.ppf(LEVEL, seeds - 1), seeds - 1, -effect * np.sqrt(seeds))
    assert 0.1 < power < 0.98, "the case would show nothing"
    assert abs(share - power) <= 0.03, f"found in {share:.1%}, expected {power:.1%}"


def test_the_whole_path_from_runs_to_p_is_that_of_scipy() -> None:
    tuned = [*chosen("muon", {0.02: 1.9}), *chosen("mkor_muon", {0.02: 1.9})]
    for base, ours in draws(4, 1.5)[:50]:
        trials = [*tuned, *confirmed("muon", list(base)), *confirmed("mkor_muon", list(ours))]
        (group,) = groups(trials, ("confirm",))
        row = next(row for row in claims(group, trials).rows if row.setting.method == "mkor_muon")
        expected = stats.ttest_rel(ours, base, alternative="less")
        assert row.difference is not None and row.reasons == ()
        assert row.p == pytest.approx(expected.pvalue, rel=1e-9) == row.adjusted
        assert row.difference.mean / row.difference.error == pytest.approx(expected.statistic, rel=1e-9)


def test_few_and_equal_differences_have_no_p() -> None:
    one, equal = paired([-0.1]), paired([-0.25, -0.25, -0.25])
    assert (one.count, one.mean, one.error, one.p) == (1, -0.1, None, None)
    assert (equal.count, equal.mean, equal.error, equal.p) == (3, -0.25, 0.0, None)


def test_holm_is_that_of_its_definition() -> None:
    p = [0.04, 0.001, 0.03, 0.5]  # sorted .001 x 4, .03 x 3, .04 x 2 (not below the one before), .5 x 1
    assert holm(p) == pytest.approx([0.09, 0.004, 0.09, 0.5])
    assert holm([]) == [] and holm([0.7, 0.6]) == [1.0, 1.0]


def test_holm_keeps_the_level_over_all_comparisons() -> None:
    """With five methods of which none differs, a draw has any significant one in at most 5 % (and 3 sigma)."""
    draw = np.random.default_rng(5)
    base, ours = draw.normal(0, 1, (DRAWS, 1, 5)), draw.normal(0, 1, (DRAWS, 5, 5))
    p = stats.ttest_1samp(ours - base, 0, axis=2, alternative="less").pvalue
    share = float(np.mean([min(holm(list(each))) < 0.05 for each in p]))
    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / DRAWS), share
