"""How good generated video is: against a reference, at the seams of chunks, over time, and its digits.

Every module reduces frames to numbers as they come: no video has to fit into memory. `docs/fidelity.md`
defines each number, and compares it with the published one.
"""
