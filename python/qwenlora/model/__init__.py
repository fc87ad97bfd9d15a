"""The model at hand: its layers, its lock, its record."""
