"""Runs, checks and publishes the notebooks: strict parameters, navigation bars, format check, HTML report."""

from helpers.notebooks.format import check, navigate, refresh
from helpers.notebooks.report import course_report
from helpers.notebooks.run import NotebookFailed, choose, execute, listing, reproduce

__all__ = [
    "NotebookFailed",
    "check",
    "choose",
    "course_report",
    "execute",
    "listing",
    "navigate",
    "refresh",
    "reproduce",
]
