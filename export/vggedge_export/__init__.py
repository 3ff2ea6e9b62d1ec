"""Keras -> ONNX -> typed graphs -> engines -> bundle. Heavy libraries are imported where they are used."""

from __future__ import annotations
