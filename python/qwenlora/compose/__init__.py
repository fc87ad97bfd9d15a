"""Bringing a model to a stack."""
