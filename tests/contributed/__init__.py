"""One method of each kind, as CONTRIBUTING says to add them: a file here, and a registry row."""
