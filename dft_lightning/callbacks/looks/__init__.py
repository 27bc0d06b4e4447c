"""What `TokenProbabilities` counts, compares, draws and writes."""
