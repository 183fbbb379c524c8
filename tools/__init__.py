"""What is used to work on forcingkv, and is not installed with it."""
