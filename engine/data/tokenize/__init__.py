"""Text <-> token ids: the tokenizer, files of other libraries converted to it, and training one.

Imports errors and util; only training one imports data.read, whose documents it trains on. Never knows corpora or
training of models.
"""
