"""The campaign of mutations: files of every format that is read, spoilt in every way, and what comes of it.

    python -m tests.hostile --inputs 10000 --seed 1

`mutations` spoils, `formats` says what is spoilt and what reads it, `seeds` makes the whole files, `child`
runs one input in a process of its own and says what happened, `__main__` counts.
"""
