"""Text <-> token ids: the tokenizer, files of other libraries converted to it, and training one.

Only train.py imports data.read, whose documents it trains on. Never knows corpora or training of models.
"""
