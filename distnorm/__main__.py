"""``python -m distnorm``, which is also what torchrun starts."""

from __future__ import annotations

import sys

from distnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
