"""Data: row formats, tasks, packing, rehearsal."""

from data.records import load_records

__all__ = ["load_records"]
