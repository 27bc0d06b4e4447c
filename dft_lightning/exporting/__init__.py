"""From what a run has learnt to a folder that transformers loads."""
