"""The page: everything in one file, readable without script, and nothing from a record becomes markup."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import ENVIRONMENT, OPTIONS, TIMING, claim, write_run

from batchnorm.report import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "</script></title></style></svg><script>document.title='owned'</script>" + (
    "<img src=x onerror=alert(1)>\"'`{{7*7}}\x1b[2J"
)


class Outline(HTMLParser):
    """Tags and attributes of a page, and whether every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def outline(folder: Path) -> Outline:
    return Outline(write_report(folder)[-1].read_text(encoding="utf-8"))


def test_page_says_it_all_without_script(run_folder: Path) -> None:
    words = outline(run_folder).words
    for text in (
        "✗ Not reproduced. 2 of 4 claims reproduced, 1 not reproduced and 1 not comparable.",
        "50,000 steps, 60 examples per step, 3 seeds, trained in 71.2 s, on AMD EPYC",
        "A network with BN ends at a higher test accuracy than the same network without",
        "0.35 percentage points",
        "95 % interval 0.20 to 0.50",
        "the 95 % interval of the paired difference over seeds lies above 0",
        "The axis begins at 0.7",
        "With BN, Algorithm 2",
        "A step with BN takes 1.41 times as long as one without.",
        "The paper gives no learning rate",
        "learning_rate 0.5",
        "torch (package) 2.13.0",
        "Values at selected steps",
    ):
        assert text in words


def test_final_accuracies_stand_side_by_side(run_folder: Path) -> None:
    words = outline(run_folder).words
    rows = [json.loads(row) for row in (run_folder / "metrics.jsonl").read_text().splitlines()]
    last = {(row["arm"], row["seed"]): row for row in rows if row["step"] == 50_000}
    plain, bn = last["plain", 1]["test_accuracy"], last["bn", 1]["test_accuracy"]
    population = last["bn", 1]["test_accuracy_population"]
    gain = f"{100 * (bn - plain):+.2f}"
    assert f"1 {100 * plain:.2f} % {100 * bn:.2f} % {100 * population:.2f} % {gain}" in words


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_page_is_well_formed_small_and_offline(run_folder: Path, sweep_folder: Path, kind: str) -> None:
    path = write_report(run_folder if kind == "run" else sweep_folder)[-1]
    page = path.read_text(encoding="utf-8")
    assert len(page.encode()) < 400_000
    found = Outline(page)
    assert found.open == []
    assert (found.count("h1"), found.count("main"), found.count("title")) == (1, 1, 1)
    addresses = [
        value
        for _, attrs in found.tags
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "action")
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in page
    assert "url(http" not in page
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all("scope" in attrs for tag, attrs in found.tags if tag == "th")
    assert all(attrs.get("aria-label") for _, attrs in found.tags if attrs.get("role") == "img")
    labels = {attrs["aria-labelledby"] for _, attrs in found.tags if "aria-labelledby" in attrs}
    assert labels <= set(ids)


def test_sweep_page_has_a_heat_table_and_no_figure1(sweep_folder: Path) -> None:
    words = outline(sweep_folder).words
    assert "97.60 % ★ best" in words
    assert "98.10 % ★ best" in words
    assert "Figure 1 " not in words.replace("Figure 1(", "")
    assert "Final test accuracy of every network" not in words


def hostile_run(folder: Path) -> Path:
    """Every string that a record can hold, hostile."""
    record = claim(**dict.fromkeys(("name", "statement", "source", "rule", "paper", "unit", "detail"), HOSTILE))
    return write_run(
        folder,
        options=OPTIONS | {HOSTILE: HOSTILE, "list": [HOSTILE], "nested": {HOSTILE: [{HOSTILE: 1}]}, "seeds": HOSTILE},
        notes=[HOSTILE],
        environment=ENVIRONMENT | {"cpu": HOSTILE, HOSTILE: HOSTILE, "packages": {HOSTILE: HOSTILE}},
        claims=[record],
        timing=TIMING,
    )


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    calm, hostile = outline(write_run(tmp_path / "calm")), outline(hostile_run(tmp_path / "hostile"))
    for tag in ("script", "img", "style", "title", "svg"):
        assert hostile.count(tag) == calm.count(tag)
    assert not [name for _, attrs in hostile.tags for name in attrs if name.startswith("on")]
    assert "{{7*7}}" in hostile.words
    assert "<script>document.title='owned'</script>" in hostile.words
    assert "\x1b" not in (tmp_path / "hostile/report.html").read_text()


def test_huge_records_keep_the_page_small(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run",
        options={f"{i}" + "k" * 10_000: "v" * 10_000 for i in range(1000)},
        notes=["n" * 100_000] * 1000,
        claims=[claim(statement="s" * 100_000)] * 5,
    )
    page = write_report(folder)[-1].read_text()
    assert len(page) < 400_000
    assert "and 900 more" in page
    assert "(100,000 characters)" in page


def test_data_block_is_json_without_markup(run_folder: Path) -> None:
    page = write_report(run_folder)[-1].read_text()
    block = re.search(r'<script type="application/json" id="figure-data">(.*?)</script>', page).group(1)
    assert not re.search("[<>&]", block)
    panels = json.loads(block)
    assert [panel["id"] for panel in panels] == ["panel-a", "panel-b", "panel-c"]
    for panel in panels:
        assert {len(panel["x"]), len(panel["labels"]), *(len(curve["text"]) for curve in panel["curves"])} == {44}


def test_records_are_only_read(run_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    for path in run_folder.iterdir():
        path.chmod(0o444)
    write_report(run_folder)
    write_report(run_folder)
    after = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"figure1.svg", "figure1.png", "report.html"}


def test_failed_write_keeps_the_old_page(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(run_folder)[-1].read_bytes()

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_bytes() == old
    assert not [path for path in run_folder.iterdir() if path.suffix == ".tmp"]
