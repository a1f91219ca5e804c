"""Proof in the user's own script that the norm, and what clip() makes of it, are right."""

from __future__ import annotations

from distnorm.verification.procedure import verify
from distnorm.verification.report import Check, VerifyReport

__all__ = ["Check", "VerifyReport", "verify"]
