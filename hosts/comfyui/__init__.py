"""Nodes for ComfyUI. Copy this folder into ComfyUI/custom_nodes, or link it; forcingkv has to be installed.

The folder: python -c 'import forcingkv.hosts.comfyui as nodes; print(*nodes.__path__)'
"""

from __future__ import annotations

from forcingkv.hosts.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
