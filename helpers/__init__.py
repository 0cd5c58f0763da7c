"""The one module the notebooks share. Each file is a room; later rooms use earlier ones, never the reverse.

The table in CONTRIBUTING.md has them in order, with what each holds.
"""
