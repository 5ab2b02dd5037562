"""Scores: answers, texts, continual learning, statistics."""

from metrics.answers import extract_answer
from metrics.text import rouge_l

__all__ = ["extract_answer", "rouge_l"]
