"""What the command line shows: documents of plain values, and tables drawn from them.

A document is what `--json` prints, in SI units. The tables are drawn from the same document, so
that both have the same numbers. A file here has what the verb of the same name shows.
"""
