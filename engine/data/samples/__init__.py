"""Training data: tokenised corpora on disk, the sample order, blends of corpora, and the data loader.

Imports config, batch and the tokenizer, but no other package of data. Never knows how a corpus was made.
"""
