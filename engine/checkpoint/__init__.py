"""The engine's own checkpoint format: safetensors files and a JSON manifest, saved and loaded in any layout.

Imports distributed, optim (the states that it saves), and the fields of config and data.samples that a resume compares.
Never knows other projects' formats: those are in interop.
"""
