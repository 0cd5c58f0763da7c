"""The one module the notebooks share. Each file is a room; later rooms use earlier ones, never the reverse.

Their order, and what each holds, is the table in CONTRIBUTING.md.
"""
