"""Bundles inside other people's programs: diffusers and ComfyUI."""
