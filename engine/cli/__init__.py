"""The `engine` command: one file per command, with its options, their checks and `run`. Heavy imports are local.

The options of clean, prepare and tokenizer are in engine.data, next to the functions that take them. Other modules:
code shared by commands (common, output), and the output or tests of one command (`*_console`, schedule_pages, dry_run,
diagnosis, selftest). Imports every package; other packages never know it.
"""
