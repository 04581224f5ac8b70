"""A whole quickstart killed ten times, beside one that nothing disturbs: `python -m tests.survival.quickstart` (an hour on 2 cores).

`--whole FOLDER` names an undisturbed one that is there already; its code and its machine must be the same.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from ssl_vit_eval.rows import RowStore

FOLDER = "runs/killed-quickstart"


def quickstart(out: str, seconds: float | None = None) -> int:
    """Its exit code; after so many seconds the process and its data workers are killed."""
    process = subprocess.Popen([Path(sys.executable).with_name("ssl-vit"), "quickstart", "--out", out], start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def numbers(folder: str) -> dict[str, tuple[float, float, float]]:
    """Each number that was measured and its interval; its id holds the hash of the weights."""
    rows = RowStore(Path(folder) / "eval").measured()
    assert rows
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: (row.value, row.ci_low, row.ci_high) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole quickstart killed at random moments must end in the numbers of one left alone.")
    parser.add_argument("--whole", help="an undisturbed quickstart of this code and machine; default: one is made first")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    whole = options.whole or f"{FOLDER}-whole"
    if options.whole is None:
        assert quickstart(whole) == 0
    rng, killed = random.Random(options.seed), 0
    while killed < options.kills:
        code = quickstart(FOLDER, rng.uniform(15, 400))  # some are longer than from one checkpoint to the next
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            break
    print(f"killed {killed} times", flush=True)
    assert quickstart(FOLDER) == 0
    assert numbers(FOLDER) == numbers(whole), "other numbers than the undisturbed quickstart's"
    print(f"{len(numbers(FOLDER))} numbers and their intervals are those of the undisturbed quickstart")


if __name__ == "__main__":
    main()
