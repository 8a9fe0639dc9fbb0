"""Text to tokens to samples, in five rooms: read -> tokenize, clean, prepare -> samples.

Training imports samples and the tokenizer, nothing else of data.
"""
