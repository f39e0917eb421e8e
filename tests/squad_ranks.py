"""What test_squad_script runs on several processes."""

from __future__ import annotations

from tests.script_runs import load_script


def evaluate(rank: int, world: int, flags: list[str]) -> int:
    """The script on one of several processes."""
    code: int = load_script("run_squad").main(flags)
    return code
