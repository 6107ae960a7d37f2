"""One file an aggregation rule; the file name is its name in a task."""
