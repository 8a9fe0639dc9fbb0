"""What training reads: corpora on disk, the sample order, blends, the loader.

Imports the tokenizer and errors. Never knows how a corpus was made.
"""
