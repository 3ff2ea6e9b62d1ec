"""vggedge: VGG classifiers from Keras to the edge. This package holds the model side and the command line."""

from __future__ import annotations

__version__ = "0.1.0"
