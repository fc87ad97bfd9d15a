"""What `bench_composition.py` measures: models and files of real size, actions, floors, plots."""
