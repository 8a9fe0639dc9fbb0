"""The `engine` command: a verb is a file, with its options, its checks and its run. Heavy imports wait inside.

The options of clean, prepare and tokenizer stand with the functions that take them. Beside the verbs: what several
share (common, output), and what one prints or tries (`*_console`, schedule_pages, dry_run, diagnosis, selftest).
Imports everything; other rooms never know it.
"""
