"""Figures and page of a run folder, written whole or not at all."""

from pathlib import Path

from batchnorm.files import write_atomic
from batchnorm.report.experiments import contents_of, load_run
from batchnorm.report.page import render_page


def write_report(folder: str | Path) -> list[Path]:
    """Draw a finished run and write its page. The records are only read; the same records give the same bytes.

    Args:
        folder: of a finished run, see :func:`load_run`.

    Returns:
        What was written: every figure as NAME.svg and NAME.png, then report.html.

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
    contents = contents_of(run)
    page = render_page(run, contents)
    files: dict[str, bytes] = {}
    for drawing in contents.drawings:
        files |= {f"{drawing.name}.svg": drawing.svg, f"{drawing.name}.png": drawing.png}
    files["report.html"] = page
    for name, data in files.items():
        write_atomic(run.folder / name, data)
    return [run.folder / name for name in files]
