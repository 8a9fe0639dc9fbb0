"""Documents from files: which files, what kind, decompressed, row by row, with what was left out and why.

Imports errors, util and the names of a tokenizer's files (which are no input). Never knows tokens, and never why the
documents are read.
"""
