"""What the tests share: doubles, runs, servers, and where things lie."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
CHECKOUT = SUPPORT.parents[1]
