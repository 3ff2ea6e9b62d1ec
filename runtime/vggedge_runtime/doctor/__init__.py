"""Doctor: what this machine and its libraries can do for vggedge, what is missing, and what adds it.

``diagnose`` never raises because something is missing or broken: that is what it is there to say.
"""

from __future__ import annotations

from vggedge_runtime.doctor.diagnosis import Diagnosis, diagnose
from vggedge_runtime.doctor.findings import Clash, Finding, Verdict

__all__ = ["Clash", "Diagnosis", "Finding", "Verdict", "diagnose"]
