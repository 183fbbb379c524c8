"""Nodes for ComfyUI. Link or copy this folder into ComfyUI/custom_nodes; forcingkv has to be installed there.

    ln -s "$(python -c 'import forcingkv.hosts.comfyui as nodes; print(*nodes.__path__)')" ComfyUI/custom_nodes/forcingkv
"""

from __future__ import annotations

from forcingkv.hosts.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
