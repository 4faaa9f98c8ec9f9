"""TensorFlow V2 checkpoints, by name (``tf.compat.v1.train.Saver``) or by object (``tf.train.Checkpoint``)."""

import re
from pathlib import Path

from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.read.bundle import Bundle, read_bundle, read_small
from batchnorm.doctor.read.graph import Graph, read_graph
from batchnorm.doctor.read.layers import Found
from batchnorm.doctor.read.object_graph import KEY, find_object_layers, read_objects
from batchnorm.doctor.read.source import shown
from batchnorm.doctor.read.table import Table
from batchnorm.doctor.read.variables import find_layers
from batchnorm.doctor.read.wire import Budget, Message
from batchnorm.errors import DataError

ENDING = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
STATE = "checkpoint"
MOST_STATE_BYTES = 1 << 20
# a graph with large constants in it can be longer; TensorFlow itself ends at 2 GiB
MOST_GRAPH_BYTES = 1 << 29
NO_GRAPH = Graph({}, frozenset())


def read_tensorflow(path: str | Path) -> Checkpoint:
    """Read a TensorFlow V2 checkpoint without TensorFlow: ``NAME.index``, ``NAME.data-*`` and, if there, ``NAME.meta``.

    The graph in ``NAME.meta`` tells which moving statistics the model has, epsilon and momentum. Without it, and
    without the objects of ``tf.train.Checkpoint``, names have to do; layers that only a vague name suggests are not
    sure.

    Args:
        path: the prefix, any of its files, a folder, or the file ``checkpoint`` that names the latest one.

    Returns:
        All tensors by their keys, and the BN layers.

    Raises:
        DataError: a file is missing, truncated, damaged, compressed or unreasonably large.
    """
    prefix = find_prefix(Path(path))
    bundle = read_bundle(prefix)
    meta = Path(f"{prefix}.meta")
    graph = NO_GRAPH
    if meta.exists():
        graph = read_graph(Message(read_small(meta, MOST_GRAPH_BYTES), Budget(meta)).message(2))
    facts = {"prefix": prefix.name, "shards": len(bundle.shards), "graph": meta.name if meta.exists() else None}
    return normal_form(Table(str(path), facts=facts), bundle, graph, "tensorflow")


def normal_form(table: Table, bundle: Bundle, graph: Graph, format: str) -> Checkpoint:
    """The tensors of a bundle, and the BN layers that its objects, a graph or names tell."""
    bundle.fill(table)
    found, tensors, unreadable = Found(), table.tensors, table.unreadable
    if KEY.encode() in bundle.entries:
        text = bundle.text(bundle.entries[KEY.encode()])
        owners = read_objects(Message(text, Budget(f"{bundle.prefix}.index")))
        find_object_layers(found, owners, tensors, graph, unreadable)
    else:
        declared, described = graph.declared, graph.described
        find_layers(found, tensors, "tensorflow", declared=declared, described=described, unreadable=unreadable)
    return table.normal_form(format, found)


def find_prefix(path: Path) -> Path:
    """What the names of a checkpoint's files begin with."""
    if path.is_dir():
        path = path / STATE
    if path.name == STATE and path.is_file():
        return latest(path)
    if path.name == STATE and len(only := list(path.parent.glob("*.index"))) == 1:
        path = only[0]
    prefix = path.with_name(ENDING.sub("", path.name))
    if not Path(f"{prefix}.index").is_file():
        raise DataError(f"{path}: expected a TensorFlow checkpoint, but there is no file {prefix.name}.index")
    return prefix


def latest(path: Path) -> Path:
    """The checkpoint that a state file names; only ones beside it, whatever path it had where it was written."""
    text = read_small(path, MOST_STATE_BYTES).decode("utf-8", "replace")
    found = re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.MULTILINE)
    if not found:
        raise DataError(f"{path}: expected a line 'model_checkpoint_path: \"NAME\"', found none")
    prefix = path.parent / Path(found[1]).name
    if not Path(f"{prefix}.index").is_file():
        raise DataError(f"{path}: it names {shown(prefix.name)}, but there is no such .index file beside it")
    return prefix
