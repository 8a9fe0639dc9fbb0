"""Raw text to cleaned JSONL: `engine clean`. Rules a document, then duplicates among what they leave.

Imports data.read. Never knows tokens or training.
"""
