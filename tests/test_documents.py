"""What the README and the docs say was measured is what the committed records hold."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from batchnorm.benchmarks.records import read_records
from batchnorm.benchmarks.tables import readme_table
from batchnorm.experiments.catalogue import EXPERIMENTS
from batchnorm.experiments.claims import Claim
from batchnorm.experiments.mnist import INIT_STDS, LEARNING_RATES, Options
from batchnorm.experiments.mnist_claims import ARMS, accuracy_claim, steps_claim
from batchnorm.report import write_report
from batchnorm.report.text import estimate

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks/results/2026-11-25-amd-epyc-2cpu.jsonl"
MNIST = ROOT / "results/mnist/2026-11-24-amd-epyc-2cpu"
ENSEMBLE = ROOT / "results/ensemble/2026-11-26-amd-epyc-2cpu-small"
EIGHT_SEEDS = ROOT / "results/mnist/2026-11-24-amd-epyc-2cpu-lr1-8seeds"
INCEPTION = ROOT / "results/inception/2026-11-25-amd-epyc-2cpu-small"
# of an experiment with several records, the one that README and docs speak of
CHOSEN = {"mnist": MNIST, "inception": INCEPTION}
SWEEP = ROOT / "results/mnist/2026-11-24-amd-epyc-2cpu-sweep"


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def claims_table() -> str:
    lines = ["| claim | here, mean and 95 % interval over 3 paired seeds | verdict |", "|---|---|---|"]
    for claim in record(MNIST, "claims.json")["claims"]:
        measured = f"{claim['mean']:.2f} ({claim['low']:.2f} to {claim['high']:.2f}) {claim['unit']}"
        lines.append(f"| {claim['statement']} | {measured} | {claim['verdict']} |")
    return "\n".join(lines)


def cost_sentence() -> str:
    timing = record(MNIST, "timing.json")
    plain, bn = (timing["arms"][arm] for arm in ("plain", "bn"))
    costs = [sum(arm["step_microseconds"].values()) / arm["networks"] for arm in (plain, bn)]
    return (
        f"Training took {timing['training_seconds']:.0f} s on two cores. "
        f"A step of one network costs {costs[0]:.0f} us\nwithout BN and {costs[1]:.0f} us with."
    )


def folder_of(experiment: str) -> Path | None:
    """None before there is a record."""
    found = list((ROOT / "results" / experiment).glob("*/"))
    return CHOSEN.get(experiment) or (found[0] if found else None)


def experiments_table() -> str:
    lines = ["| experiment | what it shows | claims reproduced here |", "|---|---|---|"]
    for entry in EXPERIMENTS:
        folder, here = folder_of(entry.name), "no record yet"
        if folder is not None:
            verdicts = [claim["verdict"] for claim in record(folder, "claims.json")["claims"]]
            here = f"[{verdicts.count('reproduced')} of {len(verdicts)}]({folder.relative_to(ROOT).as_posix()})"
        lines.append(f"| `{entry.name}` | {cell(entry.claim)} | {here} |")
    return "\n".join(lines)


def verdicts_table(folder: Path) -> str:
    lines = ["| claim | here, mean and 95 % interval | verdict |", "|---|---|---|"]
    for claim in record(folder, "claims.json")["claims"]:
        mean, interval = estimate(claim["mean"], claim["low"], claim["high"])
        here = f"{mean} ({interval}) {claim['unit']}" if claim["mean"] is not None else "not measured"
        lines.append(f"| {cell(claim['statement'])} | {here} | {claim['verdict']} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def speed_section() -> str:
    records = read_records(BENCHMARK)
    return (
        "How many times as fast as torch, torch.compile and JAX: geometric mean over the cases of a group, and the\n"
        "slowest case in brackets. AMD EPYC, two cores; every case, and what the targets were, is in\n"
        "[`benchmarks/README.md`](benchmarks/README.md).\n\n" + readme_table(records).strip()
    )


def in_turn_sentence() -> str:
    times = record(MNIST, "timing.json")["arms"]["bn"]["step_in_turn_microseconds"]
    return f"{times['torch']:,.0f} us a step of the stack with torch's,\n{times['fused']:,.0f} us with ours"


def accuracy_sentence() -> str:
    rows = [json.loads(line) for line in (MNIST / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == Options.steps]

    def mean(arm: str, field: str) -> float:
        values = [row[field] for row in last if row["arm"] == arm]
        return sum(values) / len(values)

    return (
        f"Test accuracy after {Options.steps:,} steps: {mean('plain', 'test_accuracy'):.2%} without BN, "
        f"{mean('bn', 'test_accuracy'):.2%} with BN by its running\n"
        f"averages, {mean('bn', 'test_accuracy_population'):.2%} by the population statistics of Algorithm 2."
    )


def sweep_table() -> str:
    points = {(p["init_std"], p["learning_rate"]): p["arms"] for p in record(SWEEP, "sweep.json")["points"]}
    lines = ["| scale | learning rate | without BN | with BN |", "|---|---|---|---|"]
    for std in INIT_STDS:
        for rate in LEARNING_RATES:
            plain, bn = (points[std, rate][arm]["mean"] for arm in ("plain", "bn"))
            lines.append(f"| {std:g} | {rate:g} | {plain:.2%} | {bn:.2%} |")
    return "\n".join(lines)


def eight_seeds_sentence() -> str:
    higher, faster, steadier = record(EIGHT_SEEDS, "claims.json")["claims"]

    def measured(claim: dict) -> str:
        return f"{claim['mean']:.2f} ({claim['low']:.2f} to {claim['high']:.2f})"

    return (
        f"{measured(higher)} percentage points higher,\n{measured(faster)} of the steps, "
        f"{measured(steadier)} of the drift"
    )


def unreproduced_points(judged: Callable[[list], Claim]) -> set[tuple[float, float]]:
    """Learning rate and scale of the points of the sweep where a claim is not reproduced with three seeds."""
    rows = [json.loads(line) for line in (SWEEP / "metrics.jsonl").read_text().splitlines()]
    points = set()
    for rate, std in itertools.product(LEARNING_RATES, INIT_STDS):
        here = [row for row in rows if (row["learning_rate"], row["init_std"]) == (rate, std)]
        pairs = [
            tuple([row for row in here if (row["arm"], row["seed"]) == (arm, seed)] for arm in ARMS)
            for seed in Options.seeds
        ]
        if judged(pairs).verdict != "reproduced":
            points.add((rate, std))
    return points


def test_docs_name_the_points_where_three_seeds_do_not_reproduce_a_claim():
    # docs/mnist.md, "What came out"
    assert unreproduced_points(accuracy_claim) == {(1.0, 0.05), (1.0, 0.1)}
    assert unreproduced_points(steps_claim) == {(1.0, 0.05), (1.0, 0.1), (2.0, 0.1)}


def test_docs_state_the_record_of_eight_seeds():
    assert eight_seeds_sentence() in (ROOT / "docs/mnist.md").read_text(), eight_seeds_sentence()


def test_readme_states_the_recorded_speed():
    assert speed_section() in (ROOT / "README.md").read_text(), speed_section()


def test_readme_lists_every_experiment_with_its_verdict():
    assert experiments_table() in (ROOT / "README.md").read_text(), experiments_table()


@pytest.mark.parametrize("experiment", [entry.name for entry in EXPERIMENTS if entry.module])
def test_docs_state_the_verdicts_of_a_study(experiment: str):
    folder, page = folder_of(experiment), (ROOT / "docs/studies.md").read_text()
    if folder is None:
        assert f"`{experiment}` has no record yet" in page
    else:
        assert verdicts_table(folder) in page, verdicts_table(folder)


def test_docs_state_what_the_layers_cost_by_turns():
    assert in_turn_sentence() in (ROOT / "docs/mnist.md").read_text(), in_turn_sentence()


def test_readme_states_the_recorded_claims():
    assert claims_table() in (ROOT / "README.md").read_text(), claims_table()


def test_readme_states_the_recorded_accuracies_and_costs():
    readme = (ROOT / "README.md").read_text()
    assert accuracy_sentence() in readme, accuracy_sentence()
    assert cost_sentence() in readme, cost_sentence()


def inception_table() -> str:
    claims = record(INCEPTION, "claims.json")
    level = claims["baseline_accuracy"]
    lines = [f"| network | learning rate | steps to {level:.2%} | best accuracy |", "|---|---|---|---|"]
    for arm in claims["arms"]:
        rate, steps, best = arm["learning_rate"], arm["steps_to_baseline"], arm["best_accuracy"]
        lines.append(f"| {arm['arm']} | {rate:g} | {steps:,} | {best:.2%} |")
    return "\n".join(lines)


def test_docs_state_the_recorded_inception():
    assert inception_table() in (ROOT / "docs/inception.md").read_text(), inception_table()


def ensemble_table() -> str:
    claims = record(ENSEMBLE, "claims.json")
    crops = ("single_top1", "single_top5", "crops_top1", "crops_top5")
    networks = claims["networks"]
    mean = [sum(network[name] for network in networks) / len(networks) for name in crops]
    lines = ["| | top-1, one crop | top-5, one crop | top-1, 144 crops | top-5, 144 crops |", "|---|---|---|---|---|"]
    for what, errors in (("networks, mean", mean), ("ensemble", [claims["ensemble"][name] for name in crops])):
        lines.append(f"| {what} | {' | '.join(f'{error:.1%}' for error in errors)} |")
    return "\n".join(lines)


def test_docs_state_the_recorded_ensemble():
    assert ensemble_table() in (ROOT / "docs/inception.md").read_text(), ensemble_table()


def test_docs_state_the_recorded_sweep():
    assert sweep_table() in (ROOT / "docs/mnist.md").read_text(), sweep_table()


def test_defaults_are_the_middle_of_the_sweep():
    middle = (LEARNING_RATES[len(LEARNING_RATES) // 2], INIT_STDS[len(INIT_STDS) // 2])
    assert (Options.learning_rate, Options.init_std) == middle


def test_record_was_made_with_the_defaults():
    options = record(MNIST, "config.json")["options"]
    assert options == json.loads(json.dumps(vars(Options())))


def test_readme_shows_a_figure_that_exists():
    figure = (MNIST / "figure1.png").relative_to(ROOT).as_posix()
    assert f"({figure})" in (ROOT / "README.md").read_text()
    assert (ROOT / figure).is_file()


def test_committed_pages_are_those_of_their_records(tmp_path):
    for folder in sorted((ROOT / "results").glob("*/*/")):
        copy = tmp_path / folder.parent.name / folder.name
        copy.mkdir(parents=True)
        for path in folder.glob("*.json*"):
            (copy / path.name).write_bytes(path.read_bytes())
        write_report(copy)
        assert (copy / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_readme_shows_what_the_doctor_prints():
    shown = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown
    for block in shown:
        assert block.strip() in (ROOT / "docs/doctor.md").read_text()


def test_accuracies_of_the_repaired_checkpoint_are_those_of_the_tutorial():
    sentence = re.search(r"The whole story\].*?repaired\.", (ROOT / "README.md").read_text(), re.DOTALL)
    assert sentence
    tutorial = (ROOT / "docs/tutorials/lost-statistics.md").read_text()
    shown = re.findall(r"([\d.]+) %", sentence.group())
    assert len(shown) == 3
    assert all(f": {value}%" in tutorial for value in shown)
