"""Kinds of adapters: each a file that says what its stored tensors make of a delta."""
