"""Our own format and nothing else: safetensors and a JSON manifest, saved and loaded in any layout.

Imports distributed, optim (the states that it saves) and the facts of config and data.samples that a resume compares.
Never knows other projects' formats: interop does.
"""
