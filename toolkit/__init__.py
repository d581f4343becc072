"""Declarative VisualRWKV research: compose encoders, projectors, scans, prompts and recurrences by recipe."""

from toolkit import register

__all__ = ["register"]
__version__ = "0.1.0"
