"""Raw text to cleaned JSONL: `engine clean`. Rules a document, then duplicates among what they leave.

Imports data.read and the work folder; of data nothing else. Never knows tokens or training.
"""
