"""Every policy on the two models whose videos can be judged. `python -m studies.comparison`."""
