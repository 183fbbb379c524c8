"""What serving costs, and what clients that misbehave do to it: `python -m studies.serving --help`."""
