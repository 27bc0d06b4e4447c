"""What a run will need, known before it runs: floating point operations, memory and time."""
