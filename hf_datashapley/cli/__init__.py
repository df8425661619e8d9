"""The command `datashapley`."""
