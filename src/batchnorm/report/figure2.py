"""Figure 2 of the paper: validation accuracy over steps, and where each arm reaches the plain network's best."""

from batchnorm.report.curves import gather
from batchnorm.report.drawing import Drawing, draw
from batchnorm.report.inception_records import InceptionRun
from batchnorm.report.panels import Lines, about_lines, lines_panel, panel_height
from batchnorm.report.training_page import skipped_sentence

BASELINE = "Inception"


def draw_figure2(run: InceptionRun) -> Drawing:
    """Draw the validation accuracy of every arm.

    Args:
        run: of Inception.

    Returns:
        :class:`~batchnorm.report.drawing.Drawing` with one panel.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    lines = Lines(
        curves=gather(run.evaluations, run.names),
        names=run.names,
        level=run.baseline_accuracy,
        level_name=f"best of {BASELINE}",
        marks={arm.arm: arm.steps_to_baseline for arm in run.arms if arm.steps_to_baseline is not None},
    )
    panel = lines_panel(lines, "accuracy", "Validation accuracy")
    caption = about_lines(lines)
    if lines.curves.seeds > 1 and lines.marks:
        caption += " Level and diamonds are those of the first seed."
    return draw("figure2", [panel], panel_height(lines), caption + skipped_sentence(run.evaluations, run.names))
