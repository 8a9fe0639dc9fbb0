"""Text to tokens to samples: tokenizer, .bin/.idx files, the sample order, the loader."""
