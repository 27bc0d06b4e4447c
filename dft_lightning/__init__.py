"""dft-lightning."""
