"""Documents to tokenised corpora: `engine prepare` and `engine merge-datasets`, resumable.

Imports data.read, data.tokenize, data.workfolder and the corpus format of data.samples. Never knows about data.clean
or training.
"""
