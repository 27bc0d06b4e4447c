"""From rows of a hub set or a local file to batches of supervised tokens."""
