"""``batchnorm doctor`` as a whole on damaged files of the corpora, in every output format: an answer, or one line.

``PYTHONPATH=tests python tests/doctor/test_fuzz_doctor.py 5000`` tries that many.
"""

import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from batchnorm.cli import main
from batchnorm.cli.doctor import FORMATS
from doctor import container_corpus, corpus
from doctor.networks import MOBILENETS, MODELS, trained
from doctor.test_fuzz_readers import damaged

VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 65504.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
LIBRARIES = {make.__name__ for make in (*MODELS, *MOBILENETS)}
LARGEST = 200_000
# HDF5 is read in a process of its own, which takes long to start
SLOW = (".h5", ".keras")
# what a terminal or a build server could take for a command
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def seeds(folder: Path, *, slow: bool) -> list[Path]:
    """The files and folders of the corpora, without those of other libraries, which are alike."""
    cases = {
        **{("container", name): case for name, case in container_corpus.FAULTS.items()},
        **{("container", name): case for name, case in container_corpus.HEALTHY.items()},
        **{("torch", name): case for name, case in (corpus.FAULTS | corpus.HEALTHY).items() if name not in LIBRARIES},
    }
    found = []
    for number, ((kind, _), case) in enumerate(cases.items()):
        place = folder / str(number)
        place.mkdir()
        path = case.make(place) if kind == "container" else corpus.write(case, place)
        size = path.stat().st_size if path.is_file() else 0
        if size < LARGEST and (slow or path.suffix not in SLOW):
            found.append(path)
    return found


def damage(seed: Path, place: Path, rng: random.Random) -> Path:
    """A copy with a few changes, in any file of a folder."""
    path = place / seed.name
    if seed.is_dir():
        shutil.copytree(seed, path)
        victim = rng.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
    else:
        victim = Path(shutil.copy(seed, path))
    victim.write_bytes(damaged(victim.read_bytes() or b"P", rng))
    return path


def shaken(place: Path, rng: random.Random) -> Path:
    """A sound file of values, types and gaps that no training makes."""
    state = {}
    for name, value in trained().state_dict().items():
        if rng.random() < 0.3:
            value = torch.tensor(rng.choices(VALUES, k=value.numel())).view(value.shape)
        if rng.random() < 0.1:
            value = value.to(rng.choice(DTYPES))
        if rng.random() < 0.9:
            state[name] = value
    torch.save(state, place / "shaken.pt")
    return place / "shaken.pt"


def doctor(path: Path, output_format: str) -> int:
    """The status, after a look at what was printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.run(["doctor", str(path), "--output-format", output_format])
    assert status in (0, 1, 2)
    assert "Traceback" not in err.getvalue()
    assert "fault of batchnorm" not in err.getvalue()
    assert not UNFIT.search(out.getvalue() + err.getvalue())
    if status == 2:
        assert out.getvalue() == ""
        assert re.fullmatch(r"batchnorm: .*\n", err.getvalue())
    elif output_format in ("json", "sarif"):
        json.loads(out.getvalue(), parse_constant=pytest.fail)
    elif output_format == "html":
        assert "<script" not in out.getvalue().lower()
    return status


def fuzz(rounds: int, first: int, folder: Path, *, slow: bool) -> Counter[int]:
    """How often each status came."""
    statuses: Counter[int] = Counter()
    (folder / "seeds").mkdir()
    files = seeds(folder / "seeds", slow=slow)
    for number in range(first, first + rounds):
        rng = random.Random(number)
        place = folder / str(number)
        place.mkdir()
        path = shaken(place, rng) if rng.random() < 0.2 else damage(rng.choice(files), place, rng)
        try:
            statuses[doctor(path, FORMATS[number % len(FORMATS)])] += 1
        except BaseException as error:
            error.add_note(f"number {number}: {path.name}, {FORMATS[number % len(FORMATS)]}")
            raise
        shutil.rmtree(place)
    return statuses


def test_damaged_files_of_the_corpora_give_an_answer_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz(140, 0, tmp_path, slow=False).keys() == {0, 1, 2}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        print(fuzz(int(sys.argv[1]), 10_000, Path(temporary), slow=True), f"{time.perf_counter() - start:.0f} s")
