"""Kinds of layers: how each is found, and how tensors go into it and out again."""
