"""What the README prints can be typed, and the code that it quotes is the code."""
import os
import re

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
