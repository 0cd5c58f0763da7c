"""Runs, checks and publishes the notebooks: strict parameters, navigation bars, format check, HTML report."""

from helpers.notebooks.format import KERNEL, check, navigate, normalised, refresh  # noqa: F401
from helpers.notebooks.report import rebuild_report
from helpers.notebooks.run import NotebookFailed, execute, listing, read, reproduce, write

__all__ = ["NotebookFailed", "check", "execute", "listing", "navigate", "rebuild_report", "refresh", "reproduce"]
_read, _write, _normalised = read, write, normalised  # for the authors' build scripts; delete when those are done
