"""Reads documents from input files: lists the files, detects their format, decompresses them and yields their rows.

Imports errors, util and the names of tokenizer files (which are not inputs). Never knows about tokens or the
use of the documents.
"""
