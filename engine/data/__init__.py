"""Text to tokens to samples, in five rooms: read -> tokenize, clean, prepare -> samples.

Training imports samples and the tokenizer, nothing else of data. workfolder.py: where clean, prepare and merge work
until their output is complete, and from where the same command goes on.
"""
