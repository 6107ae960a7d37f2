"""One file a net; the file name is its name in a task."""
