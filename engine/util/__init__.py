"""Files, locks, signals, pictures' fonts, threads that read ahead, and what was built: for every room.

Imports errors and the standard library; never another room.
"""
