"""Parts of `bench_adapters.py`."""
