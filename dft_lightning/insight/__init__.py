"""A look at model and data before any training: `dft diagnose` and `dft inspect`."""
