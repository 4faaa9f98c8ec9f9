"""Plain records of a finished run in; figures, one offline page and a table of verdicts out. Nothing else draws."""

from batchnorm.report.experiments import load_run
from batchnorm.report.records import Claim, Run
from batchnorm.report.verdict import VerdictTable, verdict_table
from batchnorm.report.writing import write_report

__all__ = ["Claim", "Run", "VerdictTable", "load_run", "verdict_table", "write_report"]
