"""Text to tokens to samples, in five packages: read, clean, tokenize, prepare, samples.

A package imports only those before it in the order read -> tokenize -> samples -> clean, prepare. Training imports
samples and the tokenizer, nothing else of data. workfolder.py: the folder in which clean, prepare and merge-datasets
work until their output is complete, and from which the same command resumes. Never knows about models or training.
"""
