"""Head maps for autoregressive video diffusion: measure them, bake them into engines, run them."""

__version__ = "0.1.0"
