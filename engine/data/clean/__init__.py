"""Raw text to cleaned JSONL: `engine clean`. Rules a document, then duplicates among what they leave.

Imports data.read; of data nothing else. Never knows tokens or training.
"""
