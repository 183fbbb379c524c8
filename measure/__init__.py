"""What a model costs and what a policy keeps: the planner, measurements of speed, and of fidelity."""

__all__: list[str] = []
