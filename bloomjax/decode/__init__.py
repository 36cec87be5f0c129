"""Decoding: the cache, the choice of tokens, and the engine that runs them."""
