"""Every error that vggedge raises on purpose.

VggedgeError                 exit code 1: could not be done
├── MissingDependency        an optional library is not installed; names the extra
├── UsageError               exit code 2: the request itself makes no sense
├── DataError                images or data sets that cannot be read
├── ModelError               a model that cannot be built, read or exported
├── ConversionError          a graph that came out wrong
├── BundleError              a bundle that is missing, damaged or from another version
├── EngineError              a TensorRT engine that cannot be built or used
├── SessionError             a session that gives wrong answers or is used wrongly
└── GateError                exit code 3: measured, and not good enough

A message says what was found, what was needed and what to do. The command line prints it without a
traceback; a traceback therefore always means a defect in vggedge.
"""

from __future__ import annotations

from typing import ClassVar


class VggedgeError(Exception):
    """Base of all errors that are answers rather than defects."""

    exit_code: ClassVar[int] = 1


class MissingDependency(VggedgeError):
    """An optional library is needed here and is not installed, or does not import."""


class UsageError(VggedgeError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class DataError(VggedgeError):
    """Images or data sets that are missing, unreadable, empty or of the wrong shape."""


class ModelError(VggedgeError):
    """A model that cannot be built, read, or exported."""


class ConversionError(VggedgeError):
    """A converted graph that is not what it has to be."""


class BundleError(VggedgeError):
    """A bundle that is missing, damaged, or of a version that this vggedge cannot read."""


class EngineError(VggedgeError):
    """A TensorRT engine that cannot be built or used here."""


class SessionError(VggedgeError):
    """A session that answers wrongly at its golden check, or that is used wrongly."""


class GateError(VggedgeError):
    """A limit that the user set (accuracy, latency) was measured and not met, or could not be told from it."""

    exit_code = 3
