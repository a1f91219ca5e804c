"""The doctor: not only the norm, the gradients themselves, against the same model in one process."""

from __future__ import annotations

from distnorm.verification.doctor.dumping import dump
from distnorm.verification.doctor.fingerprints import replay
from distnorm.verification.doctor.report import DoctorReport
from distnorm.verification.doctor.session import Examination, doctor

__all__ = ["DoctorReport", "Examination", "doctor", "dump", "replay"]
