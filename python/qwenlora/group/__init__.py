"""Slots that are alike, composed at once."""
