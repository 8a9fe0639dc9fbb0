"""Text <-> token ids: the tokenizer, files of other libraries converted to it, and training one.

Imports data.read (training reads documents). Never knows corpora or training.
"""
