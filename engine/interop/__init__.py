"""Import and export of other projects' models: Hugging Face folders and Megatron-LM checkpoints.

Each format is a source of rectangles of canonical tensors, like a checkpoint. Imports checkpoint, config, the model's
shapes and the tokenizer's files. Never knows training.
"""
