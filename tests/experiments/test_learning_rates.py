"""Arms at several learning rates: names, the best one, and differences over seeds."""

from pathlib import Path

import pytest

from batchnorm.experiments.learning_rates import at_rate, best, best_rate, differences, each_rate, over_rates
from batchnorm.experiments.study import Place

RATES = (0.1, 1.0)
ENDS = {at_rate("BN", 0.1): (0.5, 0.7), at_rate("BN", 1.0): (0.6, 0.5), at_rate("plain", 0.1): (0.4, 0.6)}
ROWS = [
    {"arm": arm, "seed": seed, "step": step, "test_accuracy": accuracy if step else 0.1}
    for arm, accuracies in ENDS.items()
    for seed, accuracy in enumerate(accuracies)
    for step in (0, 10)
]


def test_best_rate_has_the_highest_mean_after_the_last_step():
    assert best_rate(ROWS, "BN", RATES) == 0.1
    assert best(ROWS, "BN", RATES) == "BN, rate 0.1"


def test_differences_are_paired_percentage_points():
    assert differences(ROWS, at_rate("BN", 0.1), at_rate("plain", 0.1)) == pytest.approx([10, 10])


def test_line_over_rates_has_a_point_for_every_rate():
    line = over_rates(ROWS, "BN", RATES, "normalized")
    assert (line.name, line.x) == ("normalized", [0.1, 1.0])
    assert line.y == pytest.approx([60, 55])
    assert line.high == pytest.approx([70, 60])


def test_a_job_of_several_rates_reports_the_progress_of_all(tmp_path: Path):
    reported, names = [], []
    for _, part in each_rate(Place("BN", tmp_path, reported.append), (0.1, 1.0), steps=50, shown=1000):
        names.append(part.name)
        part.on_progress(25)
        part.on_progress(50)
    assert names == ["BN-rate0.1", "BN-rate1"]
    assert reported == [250, 500, 750, 1000]
