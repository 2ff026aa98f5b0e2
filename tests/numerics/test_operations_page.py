"""docs/operations.md is what the registered rules and the cases give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("operations_page.py")


def test_the_page_of_operations_is_generated() -> None:
    """Run `python tests/numerics/operations_page.py` after a rule or a case was added."""
    done = subprocess.run([sys.executable, str(PAGE), "--check"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
