"""Images in WebDataset shards: tar files of KEY.jpg and KEY.cls, one pair after the other."""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm.errors import DataError
from batchnorm.experiments.data.image_set import ImageData, Images, decode, require_vision

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

SUFFIXES = ("jpg", "jpeg", "png")
LABEL = "cls"
# A label is a number of a few digits: nothing longer is read
LABEL_BYTES = 20
# webdataset's rules: what comes before the first dot of the file's name is the key, and __name__ is no sample
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
META = re.compile(r"__[^/]*__($|/)")
CLASSES_FILE = "classes.json"


class ShardImages(Images):
    """The images of tar files, in their order; the encoded bytes of one shard at a time are in memory.

    Args:
        paths: the shards.
        labels: of each shard's images.
    """

    def __init__(self, paths: list[Path], labels: list[np.ndarray]) -> None:
        self.paths = paths
        self.labels = np.concatenate(labels)
        self.shard_sizes = [len(part) for part in labels]
        self.ends = np.cumsum(self.shard_sizes)
        self.current, self.samples = -1, list[tuple[str, bytes]]()

    def load(self, index: int) -> "Image.Image":
        shard = int(np.searchsorted(self.ends, index, side="right"))
        if shard != self.current:
            self.current, self.samples = -1, []
            self.samples = read_shard(self.paths[shard], self.shard_sizes[shard])
            self.current = shard
        key, data = self.samples[index - int(self.ends[shard]) + self.shard_sizes[shard]]
        return decode(data, f"{self.paths[shard]}: {key}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"current": -1, "samples": []}


def open_shards(folder: Path) -> ImageData:
    """Find and check ``train-*.tar`` and ``val-*.tar``: their headers are walked over once, the images are not read.

    Raises:
        DataError: a shard is truncated, damaged or empty, an image has no label or a label no image, a label is no
            number or out of range, or ``classes.json`` is not what it should be.
        MissingExtraError: Pillow or webdataset is not installed.
    """
    require_vision("PIL", "webdataset")
    classes = read_classes(folder / CLASSES_FILE)
    paths = {split: sorted(folder.glob(f"{split}-*.tar")) for split in ("train", "val")}
    labels = {split: [scan_shard(path) for path in paths[split]] for split in paths}
    if classes is None:
        classes = [str(label) for label in range(max(int(part.max()) for part in labels["train"]) + 1)]
        named = "the training set's largest label"
    else:
        named = CLASSES_FILE
    for path, part in zip(itertools.chain(*paths.values()), itertools.chain(*labels.values()), strict=True):
        wrong = part[part >= len(classes)]
        if len(wrong):
            raise DataError(
                f"{path}: expected labels 0 to {len(classes) - 1}, after {named}, found {wrong[0]}; "
                "make classes and shards of one data set"
            )
    train, val = (ShardImages(paths[split], labels[split]) for split in ("train", "val"))
    return ImageData(folder.resolve().name, "shards", train, val, classes)


def read_classes(path: Path) -> list[str] | None:
    """Names by label, where there is a file: ``[{"index": 0, "words": "goldfish"}, ...]`` or ``["goldfish", ...]``."""
    if not path.exists():
        return None
    expected = "expected a list of class names, or of objects with index 0, 1, ... and words or wnid"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, list) and entries and all(isinstance(entry, str) for entry in entries):
            return entries
        names = {entry["index"]: str(entry.get("words") or entry["wnid"]) for entry in entries}
        if entries and sorted(names) == list(range(len(entries))):
            return [names[index] for index in range(len(entries))]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: {expected}, found something else ({error}); mend or remove it") from error
    raise DataError(f"{path}: {expected}, found other indices; mend or remove it")


def scan_shard(path: Path) -> np.ndarray:
    """The label of each image of a shard, int64, from the tar's headers and its .cls members."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            found = list(samples(tar, path))
            # tarfile takes a file that stops between two members, or in a header, for complete
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive block")
            labels = [read_label(tar, members, f"{path}: {key}") for key, members in found if is_sample(members)]
    except tarfile.TarError as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not labels:
        raise DataError(
            f"{path}: expected members KEY.jpg and KEY.cls, found no image; remove the shard or make it again"
        )
    return np.array(labels, dtype=np.int64)


def samples(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Neighbouring members with one key, by suffix, grouped as webdataset does it."""

    def named() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for member in tar:
            match = NAME.fullmatch(member.name)
            if member.isreg() and match and not META.match(member.name):
                yield match[1], match[2].lower(), member

    for key, group in itertools.groupby(named(), key=lambda item: item[0]):
        members: dict[str, tarfile.TarInfo] = {}
        for _, suffix, member in group:
            if suffix in members:
                raise DataError(f"{path}: {key}: expected one .{suffix}, found two; give each image a key of its own")
            members[suffix] = member
        yield key, members


def is_sample(members: dict[str, tarfile.TarInfo]) -> bool:
    """Whether they are an image or a label; a README is neither."""
    return LABEL in members or any(suffix in members for suffix in SUFFIXES)


def read_label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> int:
    if LABEL not in members:
        raise DataError(f"{name}: expected a label .cls beside the image, found none; make the shard again")
    if not any(suffix in members for suffix in SUFFIXES):
        raise DataError(
            f"{name}: expected an image .{' .'.join(SUFFIXES)} beside the label, found none; make the shard again"
        )
    member = tar.extractfile(members[LABEL])
    text = member.read(LABEL_BYTES) if member else b""
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise DataError(f"{name}.cls: expected a whole number from 0, found {text[:10]!r}; make the shard again")
    return int(text)


def read_shard(path: Path, count: int) -> list[tuple[str, bytes]]:
    """Key and encoded image of each sample of a shard, all in memory."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # pyright: ignore[reportMissingImports]

    try:
        with open(path, "rb") as file:
            source: list[dict[str, Any]] = [{"url": path.name, "stream": file}]
            found = [
                (sample["__key__"], next((sample[suffix] for suffix in SUFFIXES if suffix in sample), b""))
                for sample in group_by_keys(tar_file_expander(source))
                if LABEL in sample
            ]
    except OSError as error:
        raise unreadable(path, error) from error
    except (tarfile.TarError, ValueError) as error:
        # webdataset adds objects to what the exception says
        raise damaged(path, str(error.args[0]).partition(" @ ")[0]) from error
    if len(found) != count:
        raise DataError(
            f"{path}: expected {count:,} images as at the start of the run, found {len(found):,}: it changed"
        )
    return found


def damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: expected a complete tar file, but {reason}; copy or make it again")


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; check it and its rights")
