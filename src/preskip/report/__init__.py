"""The self-contained HTML page of a run, and the model cards of what it trained."""

from preskip.report.cards import write_cards
from preskip.report.page import build_report

__all__ = ["build_report", "write_cards"]
