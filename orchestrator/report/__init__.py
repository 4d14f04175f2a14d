"""The Pareto report of a sweep: one HTML page, plots, CSV and JSON, and the front in a terminal.

::

    ReportData ──┬─ write_report ── report.html, *.png, results.csv, results.json
                 ├─ front_json ──── what `prunefield front --json` prints
                 └─ table ───────── what a terminal shows

``data`` groups the records, ``tables`` writes them as rows, ``plots`` and ``pictures`` draw them,
``page`` sets the page. A number that no record holds is shown as absent, never made up.
"""

from orchestrator.report.data import ReportData
from orchestrator.report.tables import front_json, table
from orchestrator.report.write import ReportFiles, write_report

__all__ = ["ReportData", "ReportFiles", "front_json", "table", "write_report"]
