"""Arms at several learning rates: every arm of a study is compared at its own best one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from batchnorm.experiments.study import Line, Place, Row, line, values_at_end

WORD = ", rate "


def at_rate(arm: str, rate: float) -> str:
    """The name of an arm at a learning rate.

    Example:
        >>> at_rate("BN", 0.5), split_rate("BN, rate 0.5")
        ('BN, rate 0.5', ('BN', 0.5))
    """
    return f"{arm}{WORD}{rate:g}"


def split_rate(name: str) -> tuple[str, float]:
    """Arm and learning rate of a name by :func:`at_rate`."""
    arm, rate = name.rsplit(WORD, 1)
    return arm, float(rate)


def each_rate(place: Place, rates: Sequence[float], *, steps: int, shown: int) -> Iterator[tuple[float, Place]]:
    """For a job of a training per rate, of so many steps each: the rates, and where each of them is trained.

    The job reports the progress of all of them, as a part of the steps that are ``shown`` for a job.
    """
    for i, rate in enumerate(rates):

        def report(done: int, before: int = i) -> None:
            place.on_progress(round(shown * (before + done / steps) / len(rates)))

        yield rate, place._replace(name=f"{place.name}-rate{rate:g}", on_progress=report)


def accuracies(rows: Iterable[Row], name: str) -> list[float]:
    """Test accuracy of every seed after the last step, in percent: a number even where a network diverged."""
    return [100 * value for value in values_at_end(rows, name, "test_accuracy")]


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def best_rate(rows: list[Row], arm: str, rates: Sequence[float]) -> float:
    """Where the arm ends at the highest mean test accuracy; the lowest such rate."""
    return max(rates, key=lambda rate: average(accuracies(rows, at_rate(arm, rate))))


def best(rows: list[Row], arm: str, rates: Sequence[float]) -> str:
    """The name of the arm at its best rate."""
    return at_rate(arm, best_rate(rows, arm, rates))


def differences(rows: list[Row], arm: str, other: str) -> list[float]:
    """Test accuracy of the first less that of the second, in percentage points, for every seed."""
    return [a - b for a, b in zip(accuracies(rows, arm), accuracies(rows, other), strict=True)]


def over_rates(rows: list[Row], arm: str, rates: Sequence[float], name: str) -> Line:
    """Test accuracy after the last step over the learning rate."""
    return over(rows, {rate: at_rate(arm, rate) for rate in rates}, name)


def over(rows: list[Row], names: Mapping[float, str], name: str) -> Line:
    """Test accuracy after the last step over what the named arms differ in, as a line of this name."""
    ends = [
        {"arm": name, "seed": seed, "x": x, "accuracy": accuracy}
        for x, arm in names.items()
        for seed, accuracy in enumerate(accuracies(rows, arm))
    ]
    return line(ends, name, "accuracy", x="x")
