from lora.adapter import load_adapter, save_adapter
from lora.layers import add_lora, merge_adapter

__all__ = ["add_lora", "load_adapter", "merge_adapter", "save_adapter"]
