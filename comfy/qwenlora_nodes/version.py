"""The version of the nodes, which is that of the `qwenlora` beside which they were written."""

__all__ = ["__version__"]

__version__ = "0.1.0"
