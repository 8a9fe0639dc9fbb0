"""Documents to tokenised corpora: `engine prepare` and `engine merge-datasets`, resumable.

Imports data.read, data.tokenize, the work folder and the format of data.samples. Never knows how text is cleaned, or
training.
"""
