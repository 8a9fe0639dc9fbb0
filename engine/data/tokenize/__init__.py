"""Tokenizers: text <-> token ids, conversion of other libraries' tokenizer files, and training a tokenizer.

Imports errors and util; only tokenizer training imports data.read, whose documents it trains on. Never knows
about corpora or model training.
"""
