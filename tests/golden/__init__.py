"""Golden files: outputs of public implementations on small random models, and the product against them.

`python -m tests.golden PATH...` runs every variant of files of the golden format (format 2) through the
product. `commands.json` is another matter: the tree of commands, for tests/test_command_tree.py.
"""
