"""Generation, and grading of what was generated."""
