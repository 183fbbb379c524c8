"""Random operations by many threads on sessions with the same weights; prints counts, ends with 1 on a fault.

python -m tests.threads --operations 2000 --threads 8 --seed 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.runtime.conftest import small_bundle
from tests.threads.campaign import printed, run_campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--operations", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="its words must be those of the tests' small models")
    given = parser.parse_args()
    bundle = given.bundle or small_bundle("forcing-kv")
    campaign = run_campaign(bundle, given.operations, given.threads, given.seed)
    print(printed(campaign))
    sys.exit(bool(campaign.faults))


if __name__ == "__main__":
    main()
