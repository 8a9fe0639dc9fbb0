"""The `engine` command: a verb is a file, with its options, its checks and its run. Heavy imports wait inside.

Imports everything; nothing imports it.
"""
