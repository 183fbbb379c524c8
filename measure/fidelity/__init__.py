"""How good generated video is: against a reference, at the seams of chunks, over time, and what is read.

Every module reduces frames to numbers as they come, so that no video has to fit into memory.
`docs/fidelity.md` defines each number and says how it differs from the published ones.
"""
