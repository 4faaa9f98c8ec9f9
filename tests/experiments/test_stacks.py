"""An arm spread over several processes."""

import json
from pathlib import Path

import pytest

from batchnorm.experiments.mnist import Options, reproduce_mnist, split_evenly


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_split_keeps_every_seed_in_order_and_the_largest_part_first(count: int, parts: int):
    split = split_evenly(tuple(range(count)), min(parts, count))
    assert [seed for part in split for seed in part] == list(range(count))
    sizes = [len(part) for part in split]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_stacks_give_the_rows_and_checkpoints_of_one(tmp_path: Path):
    for stacks in (1, 2):
        reproduce_mnist(Options(steps=20, seeds=(0, 1, 2), stacks=stacks), tmp_path / str(stacks), workers=2)
    one, two = tmp_path / "1", tmp_path / "2"
    assert [p.name for p in sorted(one.rglob("*"))] == [p.name for p in sorted(two.rglob("*"))]
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert (a["arm"], a["seed"], a["step"]) == (b["arm"], b["seed"], b["step"])
        # other stacks round matrix products differently; a test image or two may fall on the other side
        assert abs(a["test_accuracy"] - b["test_accuracy"]) < 1e-3
    arms = json.loads((two / "timing.json").read_text())["arms"]
    assert {name: arm["networks"] for name, arm in arms.items()} == {"plain": 2, "bn": 2}
