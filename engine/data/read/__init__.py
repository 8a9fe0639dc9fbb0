"""Documents from files: which files, what kind, decompressed, row by row, with what was left out and why.

Imports errors and util. Never knows tokens, and never why the documents are read.
"""
