"""Paint by Example in ComfyUI: nodes over the library pbe. docs/comfyui.md says how to install and use them."""

from . import nodes
from .declaring import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "nodes"]
