"""TensorFlow SavedModel folders: ``saved_model.pb`` and ``variables/``.

Source: TensorFlow's ``protobuf/saved_model.proto``, ``meta_graph.proto``, ``saved_object_graph.proto``.
"""

from pathlib import Path

from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.read.bundle import read_bundle, read_small
from batchnorm.doctor.read.graph import read_graph
from batchnorm.doctor.read.table import Table
from batchnorm.doctor.read.tensorflow import MOST_GRAPH_BYTES, normal_form
from batchnorm.doctor.read.wire import Budget, Message
from batchnorm.errors import DataError

GRAPH = "saved_model.pb"


def read_saved_model(path: str | Path) -> Checkpoint:
    """Read a SavedModel without TensorFlow; nothing of its graph is executed.

    Args:
        path: the folder, or its ``saved_model.pb``.

    Returns:
        The tensors of ``variables/`` and the BN layers, with epsilon where the graph has it.

    Raises:
        DataError: a file is missing, truncated, damaged, compressed or unreasonably large, or there are no variables.
    """
    folder = Path(path).parent if Path(path).name == GRAPH else Path(path)
    file, prefix = folder / GRAPH, folder / "variables" / "variables"
    if not file.is_file():
        raise DataError(f"{path}: expected a SavedModel, but there is no {GRAPH} in the folder")
    if not Path(f"{prefix}.index").is_file():
        raise DataError(f"{path}: a SavedModel without variables/variables.index: there is nothing to read")
    budget = Budget(file)
    graphs = list(Message(read_small(file, MOST_GRAPH_BYTES), budget).messages(2))
    if not graphs:
        raise DataError(f"{file}: expected a SavedModel with a graph, found none")
    graph = read_graph(graphs[0].message(2), bound_variables(graphs[0].message(7)))
    return normal_form(Table(str(path), facts={"graphs": len(graphs)}), read_bundle(prefix), graph, "saved_model")


def bound_variables(objects: Message) -> dict[str, list[str]]:
    """Function -> names of the variables that it captures, from a SavedObjectGraph."""
    names = [node.message(7).text(6) for node in objects.messages(1)]
    return {
        pair.text(1): [names[index] if 0 <= index < len(names) else "" for index in pair.message(2).integers(2)]
        for pair in objects.messages(2)
    }
