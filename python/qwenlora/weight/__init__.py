"""The weight that a slot's layer computes with, and its norms."""
