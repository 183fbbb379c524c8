"""What each part of a policy is worth: the demo model run without that part. `python -m studies.ablation`."""
