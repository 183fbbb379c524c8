"""What this machine can run: libraries and drivers asked in processes of their own, and what follows from it.

`child.py` and `probes.py` run in those processes, all else in the command's own, which loads no library that
could bring it down.
"""
