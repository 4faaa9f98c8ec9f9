"""Whatever the bytes of a file are: an answer or DataError in one line, soon, in little memory, and nothing is run.

``python tests/doctor/test_fuzz_readers.py 100000`` tries that many damaged files.
"""

import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchnorm.doctor.read.open import read
from batchnorm.errors import DataError
from hostile_files import entry, state_dict, tensor, text, torch_file, write_safetensors

INTERESTING = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


def examine(path: Path) -> bool:
    """Read a file and all that it is willing to give; whether it could be read."""
    try:
        checkpoint = read(path)
    except DataError as error:
        assert_one_line(error)
        return False
    for layer in checkpoint.layers:
        for role, stored in layer.tensors.items():
            assert layer.values(role).shape == stored.shape
    for stored in checkpoint.tensors.values():
        try:
            if stored.name not in checkpoint.facts.get("not_read", {}):
                assert stored.load().shape == stored.shape
        except DataError as error:
            assert_one_line(error)
    return True


def assert_one_line(error: DataError) -> None:
    assert "\n" not in str(error)


def seeds(folder: Path) -> list[bytes]:
    """A healthy file of each kind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = model.state_dict()
    torch.save(state, folder / "archive")
    torch.save({"state_dict": state, "n": [1, (2.5, None)]}, folder / "nested", pickle_protocol=4)
    torch.save(model, folder / "whole")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safe", metadata={"format": "pt"})
    torch_file(folder / "hand", state_dict(running_mean=tensor("0", 4, [4], [1])), ("archive/data/0", bytes(16)))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few changes of the kinds that matter to parsers."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice("BHIQ")
            raw = struct.pack(f"<{width}", rng.choice(INTERESTING) & ((1 << 8 * struct.calcsize(width)) - 1))
            data[at : at + len(raw)] = raw
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 64)]
        else:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
        data = data or bytearray(b"P")
    return bytes(data)


def fuzz(rounds: int, first: int, folder: Path) -> int:
    """How many of the damaged files could still be read."""
    files, path, readable = seeds(folder), folder / "damaged", 0
    for number in range(first, first + rounds):
        rng = random.Random(number)
        path.write_bytes(damaged(rng.choice(files), rng))
        try:
            readable += examine(path)
        except BaseException as error:
            error.add_note(f"seed {number}")
            raise
    return readable


def test_damaged_files_give_an_answer_or_one_line(tmp_path):
    assert 0 < fuzz(1200, 0, tmp_path) < 1200


def test_files_cut_off_anywhere_give_an_answer_or_one_line(tmp_path):
    for number, data in enumerate(seeds(tmp_path)):
        path = tmp_path / "cut"
        # every byte of one in 17, so that all parts of all files are met, and all of the last 80
        for length in [*range(number, len(data), 17), *range(len(data) - 80, len(data))]:
            path.write_bytes(data[:length])
            examine(path)


def laughs(levels: int) -> bytes:
    """2^levels values, by a value that is twice in the next one."""
    return b")" + b"2\x86" * levels


def many(operations: bytes, count: int) -> bytes:
    return b"\x80\x04" + operations * count + b"N."


ONE = tensor("0", 1, [1], [1])


def hostile_pickles() -> dict[str, bytes]:
    """What asks for more than its size, or for what is not there."""
    return {
        "value shared a billion times": state_dict(a=laughs(64), b=ONE),
        "key shared a billion times": b"\x80\x02}" + laughs(64) + b"Ns.",
        "list shared a billion times": b"\x80\x04](" + b"]\x94(h\x00h\x00e" * 1 + b"e.",
        "list that holds itself": b"\x80\x04]\x94h\x00a.",
        "dict that holds itself": b"\x80\x04}\x94" + text("a") + b"h\x00s.",
        "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "deep lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "deep dicts": b"\x80\x02" + (b"}" + text("k" * 20)) * 20_000 + ONE + b"s" * 20_000 + b".",
        "objects of objects": b"\x80\x02" + b"cx\ny\n" * 30_000 + b")" + b"R\x85" * 30_000 + b".",
        "many lists": many(b"]", 1_500_000),
        "many dicts of one": many(b"}NNs", 100_000),
        "many marks": many(b"(", 300_000),
        "many memos": many(b"N\x94", 300_000),
        "many globals": b"\x80\x02" + b"".join(b"cm\nn%d\n0" % i for i in range(30_000)) + b"N.",
        "memo at a huge place": b"\x80\x02Nr\xff\xff\xff\xff.",
        "string of 4 GB": b"\x80\x02X\xff\xff\xff\xffab.",
        "bytes of 2^63": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b".",
        "integer of megabits": b"\x80\x02\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000 + b".",
        "integer of many digits": b"\x80\x02L" + b"9" * 4000 + b"L\n.",
        "wide string": b"\x80\x02" + text("\U0001f600" + "a" * 20_000_000) + b".",
        "many tensors of one": b"\x80\x04}("
        + text("t")
        + ONE
        + b"\x94u}("
        + b"".join(text(str(i)) + b"h\x00" for i in range(110_000))
        + b"u.",
        "tensors under a long name": b"\x80\x04"
        + (b"}" + text("n" * 1000))
        + ONE
        + b"\x94\x85"
        + b"0]("
        + b"h\x00" * 200_000
        + b"es.",
        "one dict of metadata for many": b"\x80\x04}"
        + text("_metadata")
        + b"}("
        + b"".join(text(str(i)) + b"}" for i in range(1000))
        + b"us\x94("
        + b"ccollections\nOrderedDict\n)Rh\x00b" * 10_000
        + b"l.",
        "one state for many objects": b"\x80\x04}("
        + b"".join(text(str(i)) + b"]" for i in range(1000))
        + b"u\x94("
        + b"cm\nC\n)\x81h\x00b" * 10_000
        + b"l.",
        "one list of pairs for many": b"\x80\x04]("
        + b"NN\x86" * 1000
        + b"e\x85\x94("
        + b"ccollections\nOrderedDict\nh\x00R" * 10_000
        + b"l.",
        "one long name for many": b"\x80\x04"
        + text("k" * 8_000_000)
        + b"\x94]("
        + (b"}h\x00" + b"]s") * 20_000
        + b"e.",
        "one long global for many": b"\x80\x04"
        + text("k" * 8_000_000)
        + b"\x94]("
        + b"h\x00h\x00\x93" * 200_000
        + b"e.",
        "one long identity for many": b"\x80\x04(" + b"N" * 500_000 + b"t\x94](" + b"h\x00Q" * 20_000 + b"e.",
        "one long call for many": b"\x80\x04("
        + b"N" * 500_000
        + b"t\x94]("
        + b"ctorch._utils\n_rebuild_parameter\nh\x00R" * 20_000
        + b"e.",
        "stack that is empty": b"\x80\x02\x86.",
        "mark that is missing": b"\x80\x02Nt.",
        "no end": b"\x80\x02N",
        "shape of wrong type": state_dict(a=tensor("0", 4, [4], [1]).replace(b"tt", b"tN", 1)),
        "stride beyond everything": state_dict(a=tensor("0", 4, [2, 2**62], [2**62, 2**62])),
        "negative size": state_dict(a=tensor("0", 4, [-4], [1])),
        "offset beyond everything": state_dict(a=tensor("0", 4, [1], [1], offset=2**62)),
        "a thousand dimensions": state_dict(a=tensor("0", 4, [1] * 1000, [1] * 1000)),
        "storage of no type": state_dict(a=tensor("0", 4, [4], [1], kind="NoStorage")),
    }


# of one core: the slowest takes 1.5 s, by what one pickle may ask for
SLOWEST = 4
EXAMINE = r"""
import re, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from batchnorm.doctor.read.open import read
from batchnorm.errors import DataError
for name in sys.argv[2:]:
    start = time.process_time()
    try:
        read(name)
    except DataError as error:
        assert chr(10) not in str(error)
    # of this process: ru_maxrss begins with that of its parent
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(f"{time.process_time() - start:.2f} {peak:.0f} {Path(name).name}")
"""


def measured(paths: list[Path]) -> list[tuple[float, float, str]]:
    """Seconds of one core for each file, and the peak of memory so far in MB, in a process of its own."""
    command = [sys.executable, "-c", EXAMINE, str(Path(__file__).parents[2] / "src"), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.split(" ", 2) for line in result.stdout.splitlines()]
    return [(float(seconds), float(megabytes), name) for seconds, megabytes, name in rows]


def hostile_files(folder: Path) -> list[Path]:
    paths = [
        torch_file(folder / name, pickle, ("archive/data/0", bytes(16))) for name, pickle in hostile_pickles().items()
    ]
    brackets = b'{"a":[' + b"[]," * 330_000 + b"0]}"
    paths.append(write_safetensors(folder / "header of lists", brackets))
    numbers = b'{"a":[' + b"9999999," * 900_000 + b"0]}"
    paths.append(write_safetensors(folder / "header of numbers", numbers))
    names = {str(i): entry("U8", [0], 0, 0) for i in range(20_000)}
    paths.append(write_safetensors(folder / "header of tensors", names))
    return paths


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_take_neither_time_nor_memory(tmp_path):
    paths = hostile_files(tmp_path)
    rows = measured(paths)
    assert len(rows) == len(paths)
    assert [row for row in rows if row[0] > SLOWEST] == []
    assert rows[-1][1] < 300


ATTACKS = {
    "os.system": b"cos\nsystem\n(X\x05\x00\x00\x00touch tR",
    "reduce of eval": b"cbuiltins\neval\n(" + text("open('MARK','w')") + b"tR",
    "stack global": text("posix") + text("system") + b"\x93" + text("touch MARK") + b"\x85R",
    "inst": b"(" + text("touch MARK") + b"ios\nsystem\n",
    "obj": b"(cos\nsystem\n" + text("touch MARK") + b"o",
    "newobj": b"csubprocess\nPopen\n(" + text("touch MARK") + b"t\x81",
    "newobj_ex": b"csubprocess\nPopen\n(" + text("touch MARK") + b"t}\x92",
    "build": b"cx\ny\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + text("touch MARK") + b"b",
    "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\n" + text("system") + b"tR" + text("touch MARK") + b"\x85R",
    "import of a module": b"cantigravity\nfly\n)R",
    "hidden in a tensor class": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN"
    + text("touch MARK")
    + b"\x85}tR",
    "hidden in a parameter": b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\n"
    + text("touch MARK")
    + b"\x85R\x89}tR",
    "dtype of a tensor": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(cos\nsystem\n(K\x01t(K\x01t\x89tR",
    "persistent id": b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("touch MARK") + b"K\x01tQ",
    "extension": b"\x82\x01",
}
WATCHED = """
import sys
sys.path.insert(0, sys.argv[1])
from batchnorm.doctor.read.open import read
from batchnorm.errors import DataError
QUIET = {"builtins.id", "os.listdir", "os.scandir", "object.__getattr__", "sys._getframe"}
events = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) <= set("rb"):
        return
    if event not in QUIET:
        events.append((event, repr(arguments)[:200]))
sys.addaudithook(hook)
for name in sys.argv[2:]:
    try:
        for stored in read(name).tensors.values():
            stored.load()
    except DataError:
        pass
print(events)
"""


def test_nothing_is_run_imported_or_written(tmp_path):
    paths = [
        torch_file(
            tmp_path / f"{name}.pt",
            b"\x80\x04}" + text("a") + attack + b"s" + text("b") + ONE + b"s.",
            ("archive/data/0", bytes(4)),
        )
        for name, attack in ATTACKS.items()
    ]
    for name, attack in ATTACKS.items():
        (tmp_path / f"{name}.pkl").write_bytes(b"\x80\x04" + attack + b".")
        paths.append(tmp_path / f"{name}.pkl")
    seeds(tmp_path)
    paths += [tmp_path / name for name in ("archive", "whole", "legacy", "safe")]
    command = [sys.executable, "-c", WATCHED, str(Path(__file__).parents[2] / "src"), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
    assert not (tmp_path / "MARK").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the attacks are on POSIX systems")
def test_attacks_of_this_file_are_real(tmp_path):
    # the same bytes, unpickled by Python, do what they say: otherwise the test above would show nothing
    code = "import pickle, sys; pickle.loads(open(sys.argv[1], 'rb').read())"
    for name in ("stack global", "inst", "obj"):
        (tmp_path / "attack.pkl").write_bytes(b"\x80\x04" + ATTACKS[name] + b".")
        subprocess.run([sys.executable, "-c", code, "attack.pkl"], check=True, cwd=tmp_path)
        assert (tmp_path / "MARK").exists()
        (tmp_path / "MARK").unlink()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        print(fuzz(int(sys.argv[1]), 10_000, Path(place)), "readable,", f"{time.perf_counter() - start:.0f} s")
