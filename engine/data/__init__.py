"""Text to tokens to samples, in five rooms: read, clean, tokenize, prepare, samples.

A room imports those before it in read -> tokenize -> samples -> clean, prepare. Training imports samples and the
tokenizer, nothing else of data. workfolder.py: where clean, prepare and merge-datasets work until their output is
complete, and from where the same command goes on. Never knows models or training.
"""
