"""The pages of the ImageNet experiments: tables beside the paper's numbers, and nothing from a record is markup."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import ENVIRONMENT, claim, write
from synthetic_training import SETTINGS, SHAPES, read_rows, write_ensemble, write_inception, write_rows
from test_drawing import DRAW
from test_report_page import HOSTILE, Outline, outline

from batchnorm.report import write_report


def change_claims(folder: Path, **fields: object) -> None:
    write(folder, "claims.json", json.loads((folder / "claims.json").read_text()) | fields)


def test_inception_page_says_it_all_without_script(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run")
    words = outline(folder).words
    for text in (
        "Inception with and without batch normalization Ioffe & Szegedy 2015, section 4.2, Figures 2 and 3",
        "This is a small-scale test of the paper's claims, not a reproduction of its numbers.",
        "Preset small: tiny-imagenet-100 with 100 classes, 50,000 training and 5,000 validation images",
        "images of 64 x 64 pixels; the network at 0.5 of its width; 8,000 steps of 32 images.",
        "Figure 2: accuracy during training",
        "BN-x5 reaches the best accuracy of Inception in fewer steps.",
        "BN-x5 1,250 6.4 47.39 % at step 7,000 2.1 million 14.8 73.0 %",
        "BN-x5-Sigmoid never \N{EN DASH} 30.24 % at step 8,000 \N{EN DASH} \N{EN DASH} 69.8 %",
        "Inception 8,000 1 39.57 % at step 8,000 31.0 million 1 72.2 %",
        "BN-Baseline 3,500 2.29 44.73 % at step 7,000 13.3 million 2.33 72.7 %",
        "BN before every nonlinearity; higher learning rate: 5 times; no Dropout",
        "Inception nothing 0.1 4e-05 0.4 2,914,020",
        "0.02 ★ chosen 8.10 %",
        "0.04 diverged",
        "Chosen: 0.02, the highest validation accuracy of Inception after 800 steps with seed 0.",
        "Waiting for data takes 3.2 % (Inception) to 4.5 % (BN-x5-Sigmoid) of a step.",
        "One step, ms",
        "The paper does not give the momentum",
        "torch (package) 2.13.0",
        "The figure is also in figure2.svg and figure2.png.",
    ):
        assert text in words
    assert "MNIST" not in words


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        ({"preset": "paper", "data": "imagenet"}, "Preset paper: imagenet", "small-scale"),
        ({"data": "mnist"}, "The bundled MNIST stood in for ImageNet.", "Preset paper"),
        ({"preset": "quick"}, "small-scale test", "stood in"),
    ],
)
def test_banner_says_what_the_run_is(tmp_path: Path, settings: dict, present: str, absent: str) -> None:
    words = outline(write_inception(tmp_path / "run", **settings)).words
    assert present in words
    assert absent not in words


def test_ablation_arms_have_no_number_in_the_paper(tmp_path: Path) -> None:
    words = outline(write_inception(tmp_path / "run", arms=tuple(SHAPES))).words
    assert "BN-x5 without decay 2,000 4 44.36 % at step 7,750 \N{EN DASH} \N{EN DASH} \N{EN DASH}" in words


def test_diverged_arms_are_said_in_every_table(tmp_path: Path) -> None:
    words = outline(write_inception(tmp_path / "run", diverged={"BN-x30": 1})).words
    assert "BN-x30 \N{EN DASH} \N{EN DASH} diverged 2.7 million 11.5 74.8 %" in words


def test_diverged_baseline_leaves_no_level(tmp_path: Path) -> None:
    words = outline(write_inception(tmp_path / "run", diverged={"Inception": 1})).words
    assert "steps to \N{EN DASH} times fewer" in words
    assert "never" not in words


def test_run_without_the_baseline(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run", arms=("BN-x5", "BN-x30"))
    change_claims(folder, base_learning_rate=None)
    words = outline(folder).words
    assert "BN-x5 \N{EN DASH} \N{EN DASH} 47.39 %" in words
    assert "The base learning rate" not in words


def test_numbers_of_the_first_seed_are_called_that(tmp_path: Path) -> None:
    assert "The numbers are those of the first seed" in outline(write_inception(tmp_path / "run", seeds=(0, 1))).words


def test_ensemble_page_says_it_all_without_script(tmp_path: Path) -> None:
    words = outline(write_ensemble(tmp_path / "run")).words
    for text in (
        "Figure 4: errors of one network and of the ensemble",
        "Single crop 1 network, mean 52.50 % 52.00 to 53.00 25.50 % 25.00 to 26.00 25.2 % 7.82 %",
        "Multicrop 1 network, mean 49.50 % 49.00 to 50.00 22.50 % 22.00 to 23.00 21.99 % 5.82 %",
        "Ensemble, multicrop 6 networks 45.00 % 18.00 % 20.1 % 4.9 %",
        "Here over 500 validation images, in the paper over 50,000.",
        "network 3 Dropout 10 %; per-activation BN in the last module 52.40 % 25.40 % 49.40 % 22.40 %",
        "8,000 steps, 32 examples per step, 6 networks, trained in 12,346 s",
        "Accuracy during training",
        "training.svg and training.png",
    ):
        assert text in words


def test_diverged_network_leaves_the_mean_open(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "run", count=2)
    networks = json.loads((folder / "claims.json").read_text())["networks"]
    networks[0] |= {"single_top1": None, "single_top5": None}
    change_claims(
        folder, networks=networks, ensemble=dict.fromkeys(("single_top1", "single_top5", "crops_top1", "crops_top5"))
    )
    words = outline(folder).words
    assert "Single crop 1 network, mean \N{EN DASH} \N{EN DASH} 25.2 % 7.82 %" in words
    assert "Ensemble, multicrop 2 networks \N{EN DASH} \N{EN DASH} 20.1 % 4.9 %" in words


def test_searched_learning_rate_of_an_ensemble_is_shown(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "run", count=1)
    candidates = [
        {"learning_rate": 0.01, "validation_accuracy": 0.2, "validation_loss": 4.5237},
        {"learning_rate": 0.02, "validation_accuracy": 0.21, "validation_loss": None},
    ]
    change_claims(folder, base_learning_rate={"candidates": candidates, "chosen": 0.01, "rule": "the lowest loss"})
    words = outline(folder).words
    assert "Chosen: 0.01, the lowest loss." in words
    assert "0.01 \N{BLACK STAR} chosen 20.00 % 4.524 0.02 21.00 % \N{EN DASH}" in words


@pytest.mark.parametrize("write_folder", [write_inception, write_ensemble])
def test_page_is_well_formed_small_and_offline(tmp_path: Path, write_folder) -> None:
    page = write_report(write_folder(tmp_path / "run"))[-1].read_text(encoding="utf-8")
    found = Outline(page)
    assert found.open == []
    assert len(page.encode()) < 250_000
    assert (found.count("h1"), found.count("main"), found.count("title")) == (1, 1, 1)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["aria-labelledby"] for _, attrs in found.tags if "aria-labelledby" in attrs} <= set(ids)
    assert all("scope" in attrs for tag, attrs in found.tags if tag == "th")
    assert not [
        value for _, attrs in found.tags for value in (attrs.get("href"), attrs.get("src")) if value and "//" in value
    ]


def test_every_row_has_as_many_cells_as_there_are_columns(tmp_path: Path) -> None:
    tables = 0
    for folder in (write_inception(tmp_path / "a", arms=tuple(SHAPES)), write_ensemble(tmp_path / "b")):
        page = (write_report(folder)[-1]).read_text()
        for table in re.findall(r'<table class="numbers">.*?</table>', page, flags=re.DOTALL):
            head, *body = [Outline(row).tags for row in re.findall("<tr>.*?</tr>", table, flags=re.DOTALL)]
            columns = sum(int(attrs.get("colspan") or 1) for tag, attrs in head if tag == "th")
            rows = [row for row in body if ("th", {"scope": "row"}) in row]
            assert rows
            assert {sum(tag in ("td", "th") for tag, _ in row) for row in rows} == {columns}
            tables += 1
    assert tables == 10


def hostile_inception(folder: Path) -> Path:
    """Every string that a record can hold, hostile."""
    write_inception(folder, arms=("Inception", HOSTILE), preset=HOSTILE, data=HOSTILE, **{HOSTILE: [HOSTILE]})
    record = claim(**dict.fromkeys(("name", "statement", "source", "rule", "paper", "unit", "detail"), HOSTILE))
    claims = json.loads((folder / "claims.json").read_text())
    claims["arms"][1] |= {"changes": [HOSTILE]}
    claims["base_learning_rate"]["rule"] = HOSTILE
    change_claims(folder, claims=[record], arms=claims["arms"], base_learning_rate=claims["base_learning_rate"])
    write(folder, "environment.json", ENVIRONMENT | {"cpu": HOSTILE, HOSTILE: HOSTILE})
    return folder


def hostile_ensemble(folder: Path) -> Path:
    write_ensemble(folder, count=2)
    claims = json.loads((folder / "claims.json").read_text())
    claims["networks"][0] |= {"name": HOSTILE, "variations": [HOSTILE]}
    change_claims(folder, networks=claims["networks"])
    write_rows(folder, [row | ({"arm": HOSTILE} if row["arm"] == "network 1" else {}) for row in read_rows(folder)])
    timing = json.loads((folder / "timing.json").read_text())
    timing["arms"][HOSTILE] = timing["arms"].pop("network 1")
    write(folder, "timing.json", timing)
    return folder


@pytest.mark.parametrize("kind", ["inception", "ensemble"])
def test_hostile_strings_stay_text(tmp_path: Path, kind: str) -> None:
    if kind == "inception":
        calm = write_inception(tmp_path / "calm", arms=("Inception", "BN-x5"))
        hostile = hostile_inception(tmp_path / "hostile")
    else:
        calm, hostile = write_ensemble(tmp_path / "calm", count=2), hostile_ensemble(tmp_path / "hostile")
    before, after = outline(calm), outline(hostile)
    for tag in ("script", "img", "style", "title", "svg"):
        assert after.count(tag) == before.count(tag)
    assert not [name for _, attrs in after.tags for name in attrs if name.startswith("on")]
    assert "<script>document.title='owned'</script>" in after.words
    assert "\x1b" not in (hostile / "report.html").read_text()


def test_huge_records_keep_the_page_small(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run", arms=("Inception", "x" * 100_000))
    claims = json.loads((folder / "claims.json").read_text())
    claims["arms"][1]["changes"] = ["c" * 100_000] * 1000
    claims["base_learning_rate"]["rule"] = "r" * 100_000
    change_claims(folder, arms=claims["arms"], base_learning_rate=claims["base_learning_rate"])
    assert len(write_report(folder)[-1].read_text()) < 250_000


@pytest.mark.parametrize("name", ["figure2", "training"])
def test_same_input_same_bytes_in_another_process(tmp_path: Path, name: str) -> None:
    folder = write_inception(tmp_path / "run") if name == "figure2" else write_ensemble(tmp_path / "run")
    paths = write_report(folder)
    assert [path.name for path in paths] == [f"{name}.svg", f"{name}.png", "report.html"]
    first = [path.read_bytes() for path in paths]
    subprocess.run([sys.executable, "-c", DRAW, str(folder)], check=True)
    assert [path.read_bytes() for path in paths] == first


def test_rules_of_more_arms_stay_off_the_mnist_page(run_folder: Path, tmp_path: Path) -> None:
    assert ".beside" not in write_report(run_folder)[-1].read_text()
    assert ".beside" in write_report(write_inception(tmp_path / "run"))[-1].read_text()


def test_unlisted_options_are_shown_too(tmp_path: Path) -> None:
    words = outline(write_inception(tmp_path / "run", precision="bfloat16")).words
    assert "precision bfloat16" in words
    assert f"training_images {SETTINGS['training_images']}" in words
