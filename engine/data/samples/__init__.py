"""What training reads: corpora on disk, the sample order, blends, the loader.

Imports config, batch and the tokenizer; of data nothing else. Never knows how a corpus was made.
"""
