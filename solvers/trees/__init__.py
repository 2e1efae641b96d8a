"""The branch-and-bound engine: trees over dense components, and tables of components under one budget."""
