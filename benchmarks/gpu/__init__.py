"""Everything that needs a GPU, in parts with a time limit each: `make gpu`, or `python benchmarks/gpu --help`."""
