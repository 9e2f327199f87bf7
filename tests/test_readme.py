"""What the README prints can be typed, and the code that it quotes is the code."""
import os
import re

import experiments
import pytest

import analyze
import data
import judge
import sample
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = {"data": data, "train": train, "sample": sample, "judge": judge, "analyze": analyze}
COMMANDS = ("pip ", "python ", "git ", "cd ", "python3 ", ". ", "!", "%", "torchrun ", "vllm ",
            "llama-server ")


def readme():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize("name", STAGES)
def test_its_flags_exist(script, name):
    code, out, _ = script(STAGES[name], "--help")
    assert code == 0
    used = re.findall(rf"{name}\.py\b([^\n`#|]*)", readme())
    flags = {flag for line in used for flag in re.findall(r"--[a-z][a-z-]+", line)}
    assert flags <= set(re.findall(r"--[a-z][a-z-]+", out))


def test_its_code_is_the_code():
    lines = set()
    for name in ("lora", *STAGES):
        with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as file:
            lines |= {line.strip() for line in file}
    walk = readme().split("## The walk")[1].split("\n## ")[0]
    quoted = [line.strip() for line in walk.splitlines() if line.startswith("    ")]
    quoted = [x for x in quoted if not x.startswith((*COMMANDS, "tokens ", "labels "))]
    assert len(quoted) >= 8
    for line in quoted:
        assert line in lines, line


def test_its_pictures_are_there_and_small():
    pictures = re.findall(r"\]\((\.github/[^)]+)\)", readme())
    sizes = [os.path.getsize(os.path.join(ROOT, path)) for path in pictures]
    assert pictures and sum(sizes) < 1e6


def test_its_experiments_are_there():
    section = readme().split("\n## Experiments")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(experiments.EXPERIMENTS)


def row(loss, *general):
    return {"heldout_loss": loss, "margins_in": [0.0, loss], "margins_out": list(general)}


def test_an_experiment_compares_the_same_questions():
    start = row(4, 0, 0, 9)
    x = [[start, {"step": 1}, row(3, 1, 3, 9)], [start, row(2, 3, 5, 7)]]  # of two seeds
    y = [[start, row(3, 1, 1)]]  # asked two of the three questions
    logs = experiments.same_questions({"x": x, "y": y})
    (before, x), (_, y) = (experiments.mean_log(logs[line]) for line in "xy")
    assert [before["margins_out"], x["margins_out"], y["margins_out"]] == [[0, 0], [2, 4], [1, 1]]
    assert x["heldout_loss"] == 2.5 and data.contrast([before, x], [before, y], "out")[0] == 2


def test_an_experiment_compares_at_one_loss():
    log = [row(4, 0, 0), {"step": 1}, row(3, 1, 3), row(2, 3, 5)]
    assert experiments.at_loss(log, 2.75) == row(2.75, 1.5, 3.5)
