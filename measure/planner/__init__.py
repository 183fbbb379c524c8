"""Memory and speed of a model under a policy on a GPU, from numbers alone: no weights, no GPU, no torch."""

__all__: list[str] = []
