"""Tokenizers: text <-> token ids, conversion of other libraries' tokenizer files, and training a tokenizer.

Imports errors and util; only tokenizer training imports data.read, whose documents it trains on. Does not depend on
corpora or model training.
"""
