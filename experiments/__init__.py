"""One script for each claim, run as `python -m experiments.<name>` from the root of the repository."""
