"""The self-contained HTML page of a run."""

from preskip.report.page import build_report

__all__ = ["build_report"]
