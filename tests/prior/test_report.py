"""A fit in words: a difference that may be chance never reads as a gain."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from chorus.population import manifest
from chorus.prior.bootstrap import Interval
from chorus.prior.fit import PriorFit, fit_prior
from chorus.prior.fit_warnings import find_warnings
from chorus.prior.report import REPORT, save_report
from chorus.prior.results import FittedText
from tests.prior.test_fit import some_held_out

TEXT = FittedText(source="tests", num_tokens={"test": 9}, num_documents={"test": 9})


def with_difference(fit: PriorFit, difference: Interval) -> PriorFit:
    last = fit.tiers[-1]
    last = replace(last, mixture=replace(last.mixture, to_best_single=difference))
    return replace(
        fit, tiers=(*fit.tiers[:-1], last), sequential=replace(fit.sequential, difference=difference), warnings=()
    )


@pytest.mark.parametrize(
    ("low", "high", "is_chance"),
    [(-0.229, 0.085, True), (-0.229, -0.001, False), (0.001, 0.085, False), (-0.2, 0.0, True)],
)
def test_a_difference_whose_interval_contains_zero_is_called_chance(
    low: float, high: float, is_chance: bool, tiny_population: Path, tmp_path: Path
) -> None:
    fit = with_difference(fit_prior(some_held_out(4)), Interval(nats=-0.044, low=low, high=high))
    save_report(tmp_path, manifest.load(tiny_population), fit, TEXT)
    report = (tmp_path / REPORT).read_text()
    for sentence in (r"the best single member reaches [^:]*: a difference of", r"the test loss would change by"):
        found = re.search(rf"{sentence} -0\.0440 \[[^]]*\](.*)", report)
        assert found is not None
        assert found[1].startswith(", which may be chance: the interval contains zero.") == is_chance


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(nats=-0.044, low=-0.229, high=0.085), "may not be better than"),
        (Interval(nats=0.01, low=-0.1, high=0.085), "is not better than"),
        (Interval(nats=0.044, low=0.01, high=0.085), "is worse than"),
    ],
)
def test_the_command_warns_where_a_tier_shows_no_gain_over_the_best_single_member(
    difference: Interval, words: str
) -> None:
    fit = with_difference(fit_prior(some_held_out(4)), difference)
    sizes = {tier.name: len(tier.mixture.members) for tier in fit.tiers}
    (warning,) = find_warnings(list(fit.tiers), sizes, num_documents=100)
    assert warning.startswith(
        f"{fit.tiers[-1].name} {words} the best single member on the test split: {difference.nats:+.4f}"
    )
