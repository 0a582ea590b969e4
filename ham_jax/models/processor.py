"""What this machine's processor can do: the form that is fastest on one is not on another."""

import functools
import re
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
UNKNOWN = "Not known: this system has no /proc/cpuinfo that lists what its processor can do."


@functools.cache
def flags() -> tuple[str, ...]:
    """Returns the processor's features in Linux's words, such as avx2, sorted; () if not known."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return ()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)  # x86, ARM
    return tuple(sorted(set(found[1].split()))) if found else ()


def family() -> str:
    """Returns the widest vectors that it computes in: avx512, avx2 or other."""
    if "avx512f" in flags():
        return "avx512"
    return "avx2" if "avx2" in flags() else "other"


def describe() -> dict[str, Any]:
    """Returns family and flags, for a benchmark to record, or why there are none."""
    return {"family": family(), "flags": list(flags()) or UNKNOWN}
