"""The backends: one file each, all of the same shape (base.py)."""

from __future__ import annotations
