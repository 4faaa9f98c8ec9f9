"""Records and what is read off them: ratios, targets, tables."""

import json
from pathlib import Path

import pytest

from batchnorm.benchmarks import records as files
from batchnorm.benchmarks.records import append, copy_bandwidth, is_done, make_header, read_records, start_file
from batchnorm.benchmarks.summary import cases_of, step_ratios, targets, thread_gains
from batchnorm.benchmarks.tables import busy_line, cost_table, page, readme_table
from batchnorm.errors import DataError, RunError

ROOT = Path(__file__).parents[2]


def timed(case: str, peer: str, microseconds: float, **fields) -> dict:
    record = {
        "kind": "time", "suite": "full", "case": case, "where": "here", "shape": [2, 3], "activation": "relu",
        "residual": False, "dtype": "float32", "memory_format": "contiguous", "pass": "forward+backward", "peer": peer,
        "threads": 2, "tensor_bytes": 2**26, "tensors_moved": 2 if peer == "copy" else 5, "microseconds": microseconds,
        "others_cores": 0.02,
    }  # fmt: skip
    return {**record, **fields}


def stepped(model: str, peer: str, microseconds: float, memory_format: str = "contiguous") -> dict:
    return {
        "kind": "step", "suite": "steps", "case": f"{model} {memory_format}", "model": model, "peer": peer, "batch": 16,
        "memory_format": memory_format, "microseconds": microseconds,
    }  # fmt: skip


HEADER = {
    "kind": "header", "schema_version": 1, "date": "2026-01-02", "threads": 2, "huge_pages": "madvise",
    "copy_gigabytes_per_second": 40.0,
    "environment": {
        "cpu": "A Processor", "cpu_capability": "AVX2", "memory_gib": 8.0, "platform": "Linux x86_64",
        "python": "3.11.0",
    },
    "packages": {"torch": "2.13.0", "jax": None},
}  # fmt: skip
SAMPLE = [
    HEADER,
    {"kind": "skipped", "peer": "jax", "reason": "JAX is not installed"},
    timed("a", "copy", 10.0),
    timed("a", "torch", 120.0, peak_bytes=3 * 2**26),
    timed("a", "torch.compile", 240.0),
    timed("a", "jax", 90.0),
    timed("a", "ours", 30.0, peak_bytes=2 * 2**26),
    timed("b", "torch", 30.0, tensor_bytes=24),
    timed("b", "torch.compile", 80.0, tensor_bytes=24),
    timed("b", "ours", 30.0, tensor_bytes=24),
    timed("c", "torch", 5.0, activation="sigmoid"),
    timed("c", "ours", 10.0, activation="sigmoid"),
    timed("without ours", "torch", 5.0),
    stepped("ResNet-18", "torch", 120e4),
    stepped("ResNet-18", "ours", 100e4),
    stepped("MobileNetV2", "torch", 100e4, "channels_last"),
    stepped("MobileNetV2", "ours", 50e4, "channels_last"),
    *(timed("t", "ours", 100.0 / n, suite="threads", threads=n) for n in (1, 2)),
    *(timed("t", "torch", 100.0, suite="threads", threads=n) for n in (1, 2)),
    timed("s", "torch", 8.0, suite="size"),
    timed("s", "ours", 4.0, suite="size"),
    {"kind": "failed", "case": "d", "pass": "forward", "peer": "ours", "suite": "full", "reason": "output is off"},
]


def test_ratios_come_from_the_medians_of_one_case():
    a, b, c = cases_of(SAMPLE)
    assert (a.ratio("torch"), a.ratio("torch.compile", "jax"), b.ratio("torch.compile", "jax")) == (4.0, 3.0, 80 / 30)
    assert c.ratio("jax") is None
    # five tensors in 30 us, where copying two takes 10
    assert a.bandwidth_share() == pytest.approx(5 / 30 * 10 / 2)
    assert b.bandwidth_share() is None
    assert (a.memory("peak_bytes"), a.memory("peak_bytes", "torch")) == (2, 3)


def test_a_later_record_replaces_an_earlier_one():
    (a, *_) = cases_of([*SAMPLE, timed("a", "ours", 60.0)])
    assert a.ratio("torch") == 2.0


def test_targets_are_judged_by_the_records():
    found = [(target.value, target.reached) for target in targets(SAMPLE)]
    assert found == [
        (2.0, False),  # geometric mean of 4 and 1
        (pytest.approx((3 * 80 / 30) ** 0.5), False),
        (0.5, False),  # c
        (pytest.approx(5 / 6), True),
        # MobileNetV2 was measured in channels_last alone
        (pytest.approx(1.2), True),
        (2.0, True),
    ]
    lowest = targets(SAMPLE)[2]
    assert lowest.detail == "c, forward+backward; geometric mean 1.26"


def test_nothing_measured_is_not_a_target_missed():
    assert targets([HEADER]) == []


def test_a_cost_is_held_against_the_same_without_it():
    took = {"without": 100.0, "ours": 110.0}
    records = [
        {
            "kind": "cost",
            "suite": "statistics",
            "case": "recalibrate of torch",
            "peer": peer,
            "microseconds": us,
            "batch": 2,
        }
        for peer, us in took.items()
    ]
    (target,) = targets([HEADER, *records])
    assert (target.value, target.reached) == (pytest.approx(1 / 1.1), False)
    assert "| recalibrate of torch | 2 | 0 | without 0 ms, 0.91 |" in cost_table(records)


def test_steps_and_threads():
    assert step_ratios(SAMPLE) == {("ResNet-18", "contiguous"): 1.2, ("MobileNetV2", "channels_last"): 2.0}
    assert thread_gains(SAMPLE) == {"t": 2.0}
    assert thread_gains(SAMPLE, "torch") == {"t": 1.0}


def test_the_page_shows_every_part(tmp_path):
    path = tmp_path / "2026-01-02-a-processor.jsonl"
    append(path, SAMPLE)
    text = page([path])
    for line in (
        "## 2026-01-02-a-processor",
        "A Processor, AVX2, 8.0 GiB; 2 threads; copying 64 MiB reads and writes 40.0 GB/s; huge pages: madvise. "
        "Linux x86_64, Python 3.11.0, torch 2.13.0. 2026-01-02.",
        "Other processes used 0.02 cores in the median, at most 0.02.",
        "| a | forward+backward | 30 | 4.00 | \N{EN DASH} | 8.00 | 3.00 | 0.83 | 2.0 | 3.0 |",
        "| ResNet-18 | contiguous | 16 | 1,200 | 1.20 |",
        "| 2x3 | 4 | 2.00 |",
        "| t | 2.00 | 1.00 |",
        "- Failed: d, forward: output is off",
        "- Left out: jax, because JAX is not installed",
    ):
        assert line in text.splitlines(), line
    assert page([path]) == text


def test_a_busy_machine_is_said():
    assert "not representative" not in busy_line(SAMPLE)
    assert "not representative" in busy_line([timed("a", "ours", 1.0, others_cores=0.5)])
    assert busy_line([HEADER]) == ""


def test_the_table_of_the_readme_has_a_row_per_group():
    row = "| here | forward+backward | 3 | 1.26 (0.50) | 4.62 (2.67) | 3.00 (3.00) |"
    assert row in readme_table(SAMPLE).splitlines()


def test_the_committed_page_is_that_of_the_records():
    paths = list((ROOT / "benchmarks/results").glob("*.jsonl"))
    assert paths
    assert (ROOT / "benchmarks/README.md").read_text() == page(paths)


def test_a_stopped_record_goes_on_without_its_torn_line(tmp_path):
    path = tmp_path / "new" / "record.jsonl"
    header = make_header(0.1)
    assert start_file(path, header, resume=False) == []
    append(path, [timed("a", "ours", 1.0)])
    with open(path, "a") as file:
        file.write('{"kind": "ti')
    found = start_file(path, header, resume=True)
    assert [record["kind"] for record in found] == ["header", "time"]
    assert read_records(path) == found
    assert is_done(found, "full", "a")
    assert not is_done(found, "quick", "a")


def test_a_record_is_not_overwritten_nor_mixed(tmp_path):
    path = tmp_path / "record.jsonl"
    append(path, [HEADER])
    with pytest.raises(RunError, match=r"record.jsonl: exists already; continue it with --resume"):
        start_file(path, HEADER, resume=False)
    with pytest.raises(RunError, match="made with another threads"):
        start_file(path, {**HEADER, "threads": 1}, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected records of batchnorm bench"),
        ("[]\n", "expected records of batchnorm bench"),
        ("not JSON\n", "expected one JSON object per line"),
        ('{"kind": "time"}\n', "expected a header with schema_version 1"),
        ('{"kind": "header", "schema_version": 2}\n', "expected a header with schema_version 1"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_the_header_is_plain_data(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(files, "COPIED_BYTES", 2**16)
    header = make_header(2.0)
    assert json.loads(json.dumps(header)) == header
    assert header["copy_gigabytes_per_second"] > 0
    assert copy_bandwidth() > 0
    monkeypatch.setattr(files, "HUGE_PAGES", tmp_path / "absent")
    assert make_header(2.0)["huge_pages"] is None
