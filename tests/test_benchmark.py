import json
import subprocess
import sys
from pathlib import Path

import pytest

from ham_jax import benchmark

ROOT = Path(__file__).parents[1]

OBEDIENT = """
import json, sys
print(json.dumps({"parameters": 7}), flush=True)
for line in sys.stdin:
    print(json.dumps(2 * int(line)), flush=True)
"""


def test_a_contestant_answers_for_itself_and_ends_when_it_is_left():
    with benchmark.Contestant("peer", [sys.executable, "-c", OBEDIENT]) as peer:
        assert peer.about == {"parameters": 7}
        assert [peer.work(n) for n in (1, 21)] == [2, 42]
    with pytest.raises(RuntimeError, match="peer ended with 3"):
        benchmark.Contestant("peer", [sys.executable, "-c", "raise SystemExit(3)"])


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    rates = {"ours": [10.0, 30.0, 20.0], "other": [10.0, 10.0, 40.0]}
    compared = benchmark.compared(rates)
    assert compared["ours"] == {"median": 20, "min": 10, "max": 30, "ratio": 1}
    assert compared["other"] == {"median": 10, "min": 10, "max": 40, "ratio": 1}


def test_each_convolution_is_timed_in_each_form(tmp_path):
    output = tmp_path / "conv.json"
    command = ["-m", "ham_jax.benchmark", "conv", "--work=resnet18:32:1", "--seconds=0.01"]
    subprocess.run([sys.executable, *command, f"--json={output}"], cwd=ROOT, check=True)
    shapes = json.loads(output.read_text())["results"]["resnet18:32:1"]
    assert sum(shape["count"] for shape in shapes) == 20
    for shape in shapes:
        for chosen, of_part in zip(shape["chosen"], shape["ms"].values(), strict=True):
            assert "direct" in of_part
            assert of_part[chosen] > 0
