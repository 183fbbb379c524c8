"""LoRAs as people have them: read in the layouts of all trainers, checked, and merged into the weights."""

from forcingkv.models.lora.merging import Merger, OpenLora, open_loras
from forcingkv.models.lora.request import Lora, LoraLike, asked

__all__ = ["Lora", "LoraLike", "Merger", "OpenLora", "asked", "open_loras"]
