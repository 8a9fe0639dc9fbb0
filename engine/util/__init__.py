"""Files, locks, signals, pictures' fonts, threads that read ahead, loading extensions, what was built: for every room.

Imports errors and the standard library. Never knows another room.
"""
