"""Raw text to cleaned JSONL, `engine clean`: rules for each document, then removal of duplicates among the kept ones.

Of engine.data, imports only read and workfolder. Never knows about tokenizers or training.
"""
