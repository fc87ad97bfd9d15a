"""The packed layout of 4-bit layers."""
