"""A long run of one process: what a session does, right and wrong, in random order.

    python studies/soak.py --minutes 10
    python studies/soak.py --chunks 5000 --seed 3 --bundle bundle

Videos begin, are left, switched, saved, restored, end with errors; sessions are made, closed and dropped.
Prints memory, threads, open handles and seconds a chunk of the first and of the last fifth of the run, and
ends with 1 if they grew, or if the last video is not, to the bit, that of a process of its own. Without
`--bundle` it exports the demo model.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil

from forcingkv.headmaps import InputError
from forcingkv.models.demo.prompts import PROMPTS
from forcingkv.runtime import Chunk, NotFiniteError, Session, Video
