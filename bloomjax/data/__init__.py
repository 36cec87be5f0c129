"""Text to token rows: tokenizers, indexed datasets, and the order in which rows are read."""
