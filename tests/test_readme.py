"""What the README and its two pages print can be typed, and the code that it quotes is code."""
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
PAGES = ("README.md", "tests/experiments.md", "tests/course.md")
STAGES = {"data": data, "train": train, "sample": sample, "judge": judge, "analyze": analyze}
COMMANDS = ("pip ", "python ", "git ", "cd ", "python3 ", ". ", "!", "%", "torchrun ", "vllm ",
            "llama-server ")


def read(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        return file.read()


def commands(text):
    """A page's commands: the lines of its code blocks, and what stands in backticks."""
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    blocks = [line for line in blocks if line.strip().startswith(COMMANDS)]
    prose = "\n".join(line for line in text.splitlines() if line not in blocks)
    spans = re.findall(r"`([^`]+)`", prose.replace("```", ""))
    return [re.split(r"#|\|", command)[0] for command in blocks + spans]


def flags_in(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))


@pytest.mark.parametrize("name", STAGES)
def test_their_flags_exist(script, name):
    code, out, _ = script(STAGES[name], "--help")
    assert code == 0
    for page in PAGES:
        for command in commands(read(page)):
            for after in re.split(rf"\b{name}\.py", command)[1:]:
                assert flags_in(after) <= flags_in(out), command


def test_flags_that_stand_alone_exist(script):
    known = set()
    for stage in STAGES.values():
        known |= flags_in(script(stage, "--help")[1])
    for page in ("README.md", "tests/experiments.md"):
        for command in commands(read(page)):
            if command.startswith("--"):
                assert flags_in(command) <= known, command


def test_its_code_is_the_code():
    lines = set()
    for name in ("lora", *STAGES):
        lines |= {line.strip() for line in read(f"{name}.py").splitlines()}
    walk = read("README.md").split("## The walk")[1].split("\n## ")[0]
    quoted = [line.strip() for line in walk.splitlines() if line.startswith("    ")]
    quoted = [x for x in quoted if not x.startswith((*COMMANDS, "tokens ", "labels "))]
    assert len(quoted) >= 4
    for line in quoted:
        assert line in lines, line


def test_its_25_lines_train(tiny, few):
    """Its numbers are tested where it stands, in test_train.py; `few` keeps the data small."""
    code = read("README.md").split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    changed = code.replace('"smollm2"', repr(tiny)).replace("layers[15]", "layers[2]")
    changed = changed.replace("range(60)", "range(2)")
    names = {}
    exec(changed, names)
    assert names["B"].abs().sum() > 0 and names["loss"] < 20


def test_the_fold_is_the_one_that_it_names():
    fold = re.search(r"the line `(# ---- [^`]*?) ?\.\.\.`", read("README.md"))[1]
    folded = [name for name in ("lora", *STAGES) if f"\n{fold}" in read(f"{name}.py")]
    assert folded == ["lora", *STAGES]


def test_their_pictures_are_there_and_small():
    pictures = set()
    for page in PAGES:
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", read(page)):
            pictures.add(os.path.normpath(os.path.join(os.path.dirname(page), path)))
    assert pictures and all(path.startswith(".github") for path in pictures)
    assert sum(os.path.getsize(os.path.join(ROOT, path)) for path in pictures) < 1e6


def test_their_links_lead_somewhere():
    for page in PAGES:
        folder = os.path.join(ROOT, os.path.dirname(page))
        for link in re.findall(r"\]\((?!http)([^)#]+)", read(page)):
            assert os.path.exists(os.path.join(folder, link)), (page, link)


def test_its_experiments_are_there():
    for page in ("README.md", "tests/experiments.md"):
        section = read(page).split("\n## Eight questions")[1].split("\n## ")[0]
        assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(
            experiments.EXPERIMENTS
        )


def test_it_is_short():
    assert len(read("README.md").splitlines()) <= 350


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
