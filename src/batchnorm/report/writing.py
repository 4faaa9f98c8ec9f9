"""Figures and page of a run folder, written whole or not at all."""

from pathlib import Path

from batchnorm.files import write_atomic
from batchnorm.report.figure1 import draw_figure1
from batchnorm.report.page import render_page
from batchnorm.report.records import load_run
from batchnorm.report.sweep import draw_sweep


def write_report(folder: str | Path) -> list[Path]:
    """Draw a finished run and write its page. The records are only read; the same records give the same bytes.

    Args:
        folder: of a finished run, see :func:`load_run`.

    Returns:
        What was written: figure1.svg, figure1.png and report.html; for a sweep sweep.svg, sweep.png and report.html.

    Raises:
        RunError: a record is missing or has unexpected contents.
        MissingExtraError: matplotlib is not installed.
        OSError: the folder cannot be written; older files in it stay whole.

    Example:
        >>> write_report("no-such-folder")
        Traceback (most recent call last):
        batchnorm.errors.RunError: no-such-folder: not a folder; expected the folder of a finished run
    """
    run = load_run(folder)
    drawing = draw_sweep(run) if run.points else draw_figure1(run)
    page = render_page(run, drawing)
    files = {f"{drawing.name}.svg": drawing.svg, f"{drawing.name}.png": drawing.png, "report.html": page}
    for name, data in files.items():
        write_atomic(run.folder / name, data)
    return [run.folder / name for name in files]
