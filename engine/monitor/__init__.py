"""What a person sees of a run: metrics, progress, health, spikes, pictures.

Imports what it looks at. Never changes what it looks at, and never decides what a run does.
"""
