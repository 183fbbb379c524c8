"""What happens to results when disks fill, processes are killed, and several write at once."""
