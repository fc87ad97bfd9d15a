"""Threads, and memory that they may still be writing."""
