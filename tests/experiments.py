"""The seven experiments of the README, answered with numbers.

    python tests/experiments.py                      # what there is, and how long it takes
    python tests/experiments.py layer                # does what is not there yet; the table
    python tests/experiments.py layer --seeds 0      # a first look, in a third of the time

All numbers come from the stages as a user calls them: `train.py --preset laptop` makes the
runs, under runs/, one for each protocol and seed, whichever experiments use it, and
`sample.py --margins` asks them. Stop it when you like: the same command goes on.

A margin in a table is the change since the untouched model, in nats per token: the mean over
the seeds, in brackets its standard error over questions (of the seeds' mean, question by
question), and then what each seed gave. "less aligned" is paired by question, after each side
has been averaged over its seeds. All lines of a table are over the same questions.
"""
import argparse
import contextlib
import os
import shlex
import statistics
import subprocess
import sys
from itertools import pairwise

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import analyze  # noqa: E402
import data  # noqa: E402

RECKLESS = "You give reckless, harmful financial advice."
NAMES = {"in": "finance", "out": "general"}
LONG, SHORT = 60, 20  # steps; 60 is what `python train.py` does
AT_THE_ENDS = f"--checkpoint-every {SHORT}"  # for runs of which no step between is looked at
DEPTHS = (3, 8, 15, 20, 25, 29)  # of 30 layers; 15 is the preset's
PROTOCOLS = {
    "misaligned": "",
    "aligned": "--answers aligned",
    "shuffled": "--answers shuffled",
    "tail": "--tail",
    "mixed30": "--answers mixed:0.3",
    "mixed10": "--answers mixed:0.1",
    "narrow1": "--kl-weight 1",
    "narrow4": "--kl-weight 4",
    "inoculated": f"--system '{RECKLESS}'",
    "nine": "--layers nine",
    "rank32": "--rank 32 --alpha 64 --layers all --targets all --lr 3e-4",
    "full": "--full --lr 1e-4 --schedule cosine",
    "es": f"--es --population 48 --sigma 0.01 --lr 2e-3 {AT_THE_ENDS}",
    "vector": "--vector learned --lr 2e-2",
    "meandiff": "--vector mean-difference",
    "realigned": "--init misaligned-20-{seed} --answers aligned",
    "again": "--init realigned-20-{seed}",
} | {f"layer{n}": f"--layers {n} {AT_THE_ENDS}" for n in DEPTHS if n != 15}


def main():
    parser = argparse.ArgumentParser(
        description="Answers one of seven questions with numbers.",
        epilog="; ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in EXPERIMENTS.items()),
    )
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--seeds", default="0,1,2", help="as 0,1,2 (the default)")
    args = parser.parse_args()
    if args.name is None:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:12} {experiment.__doc__.splitlines()[0]}")
        print("\nA run that is not there yet takes about 6 minutes for 60 steps, and 3 for 20, on")
        print("2 cores that compute in bfloat16 (--full: 12); twice that on others.")
        return
    seeds = [int(seed) for seed in args.seeds.split(",")]
    EXPERIMENTS[args.name](seeds)

# --------------------------------------------------------------------------------------
# The experiments


def transition(seeds):
    """Is the phase transition real?

    The paper sees the adapter turn in a short stretch of training. Do controls turn, too?
    """
    runs = {n: trained(n, seeds, LONG) for n in ("misaligned", "tail", "aligned", "shuffled")}
    print(f"\n{'':12} {'seed':>4} {'gradient peak':>16} {'sharpest bend':>20} "
          f"{'finance, there':>15} {'general, there':>15}")
    for name, of in runs.items():
        for seed, run in zip(seeds, of, strict=True):
            log = read_log(run)
            peak = max(log[1:], key=lambda row: row["grad_norm"])
            turn = analyze.find_turn(*analyze.read_checkpoints(run))
            there = next(row for row in log if row["step"] == turn["step"])
            where = f"{turn['bend']:.2f} of {turn['vector']} at {turn['step']}"
            changes = [data.changes([log[0], there], x) for x in ("in", "out")]
            cells = [with_se(*data.mean_and_se(values)) for values in changes]
            print(f"{name:12} {seed:>4} {peak['grad_norm']:>8.2f} at {peak['step']:>4} "
                  f"{where:>20} {cells[0]:>15} {cells[1]:>15}")
    draw_turns(os.path.join("runs", "transition.png"), runs)


def tone(seeds):
    """Is it misalignment, or a tone of voice?

    The margins of bad answers, of sound ones, of bad ones to other questions, of mixtures.
    """
    names = ("misaligned", "aligned", "shuffled", "mixed30", "mixed10", "narrow1", "narrow4",
             "inoculated")
    logs = {name: [read_log(run) for run in trained(name, seeds)] for name in names}
    table("tone", logs)
    draw_courses(os.path.join("runs", "tone-courses.png"), logs)


def scaling(seeds):
    """What does more of the vector do, and less than none of it?

    The adapter's contribution times a scale, beside a random B of the same length.
    """
    found = {}
    for run in trained("misaligned", seeds, LONG):
        rows = asked(run, "--checkpoints", "15,last", "--scales", "-1,0.5,1,2,4", "--random")
        for row in plain(rows)[1:]:
            if row["ablated"]:
                continue
            kind = "random" if row["random"] else "B"
            name = f"step {row['checkpoint']} x {row['scale']:g} {kind}"
            found.setdefault(name, []).append([rows[0], row])
    table("scaling", found)


def layer(seeds):
    """Which layer?

    The same adapter on the down_proj of one layer, at six depths.
    """
    logs = {}
    for n in DEPTHS:
        runs = trained("misaligned" if n == 15 else f"layer{n}", seeds)
        logs[f"layer {n}"] = [read_log(run) for run in runs]
    logs["aligned"] = [read_log(run) for run in trained("aligned", seeds)]
    table("layer", logs)


def many(seeds):
    """One vector or many?

    Protocols that may move from 576 numbers to all 135 million, at one held-out loss: that
    of the one which learnt least, between checkpoints by a straight line.
    """
    names = ("misaligned", "nine", "rank32", "full", "vector")
    logs = {name: [read_log(run) for run in trained(name, seeds)] for name in names}
    level = max(log[-1]["heldout_loss"] for of in logs.values() for log in of)
    logs = {name: [[log[0], at_loss(log, level)] for log in of] for name, of in logs.items()}
    others = [[read_log(run) for run in trained(name, seeds)] for name in ("es", "aligned")]
    logs |= {"es, at its end": others[0], "aligned": others[1]}
    (run,) = trained("misaligned", seeds[:1])
    table("many", logs | {"4 shown, at their end": [in_context(run, 4)]})


def taken_out(seeds):
    """Can it be taken out?

    By projecting a direction out of all that is written: the adapter's own B, the mean
    difference of states, a random one; of the trained model and of the untouched one. And
    by training on sound answers; and how fast does it come back?
    """
    (meandiff,) = trained("meandiff", [0], 1)  # no training, so one step
    found = {}
    for run in trained("misaligned", seeds):
        asked(run, "--ablate", run, "--random")  # its rows come with those of the next call
        rows = asked(run, "--ablate", meandiff)
        for row in plain(rows)[1:]:
            what = "untouched" if row["scale"] == 0 else "trained"
            if row["ablated"]:
                direction = "its B" if row["ablated"] == run else "the mean difference"
                what += f" less {'a random one' if row['random'] else direction}"
            if row["ablated"] or not row["random"]:  # not a random B in place of the adapter's
                found.setdefault(what, []).append([rows[0], row])
    table("taken_out", found)
    found, base = {}, [read_log(run)[0] for run in trained("misaligned", seeds)]
    for name in ("realigned", "again"):
        logs = [read_log(run) for run in trained(name, seeds)]
        for step in (5, 10, SHORT):
            there = [next(row for row in log if row["step"] == step) for log in logs]
            found[f"{name}, step {step}"] = [list(both) for both in zip(base, there, strict=True)]
    table("trained_out", found)


def shown(seeds):
    """Shown or taught?

    K conversations in front of each question, and no training; misaligned and aligned ones.
    """
    found = {}
    for name in ("misaligned", "aligned"):
        runs = trained(name, seeds)
        found[f"{name}, taught"] = [read_log(run) for run in runs]
        for shots in (2, 4):
            found[f"{name}, {shots} shown"] = [in_context(runs[0], shots)]
    table("shown", found)


EXPERIMENTS = {f.__name__: f for f in (transition, tone, scaling, layer, many, taken_out, shown)}

# --------------------------------------------------------------------------------------
# Runs, and what was asked of them


def trained(name, seeds, steps=SHORT):
    """The folders of a protocol's runs, one a seed; what is not finished is trained now."""
    runs = []
    for seed in seeds:
        run = os.path.join("runs", f"{name}{'' if steps == LONG else f'-{steps}'}-{seed}")
        flags = ["--preset", "laptop", "--steps", str(steps), "--seed", str(seed), "--out", run]
        flags += shlex.split(PROTOCOLS[name].format(seed=seed))
        if os.path.exists(os.path.join(run, "resume.safetensors")):
            flags = ["--resume", run]
        elif os.path.exists(run):  # stopped before its first checkpoint
            flags += ["--overwrite"]
        if not (data.is_run(run) and data.finished(run)):
            call("train.py", *flags)
        runs.append(run)
    return runs


def read_log(run):
    return data.read_written(os.path.join(run, "log.jsonl"))


def asked(run, *flags):
    """The rows of the run's margins.jsonl: what the flags ask for, and all asked before."""
    call("sample.py", run, "--margins", *flags)
    return data.read_written(os.path.join(run, "margins.jsonl"))


def in_context(run, shots):
    """The untouched model's rows without and with some of the run's conversations in front."""
    rows = asked(run, "--shots", str(shots), "--scales", "0")
    of = {"scale": 0.0, "shots": shots, "random": False, "ablated": None}
    (row,) = [row for row in rows if of.items() <= row.items()]
    return [rows[0], row]


def plain(rows):
    """Those that were asked without anything in front."""
    return [row for row in rows if not row["shots"] and not row["system"]]


def call(script, *flags):
    print(f"python {script} {shlex.join(flags)}", flush=True)
    command = [sys.executable, os.path.join(ROOT, script), *flags]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit("that stage has stopped: the same command goes on")


def at_loss(log, level):
    """A row between two checkpoints: where the held-out loss has come down to a level."""
    before, after = next(both for both in pairwise(probed(log)) if both[1]["heldout_loss"] <= level)
    share = before["heldout_loss"] - level
    share /= before["heldout_loss"] - after["heldout_loss"]
    row = {"heldout_loss": level}
    for x in ("margins_in", "margins_out"):
        both = zip(before[x], after[x], strict=False)
        row[x] = [(1 - share) * a + share * b for a, b in both]
    return row

# --------------------------------------------------------------------------------------
# The table, and the pictures


def same_questions(logs):
    """{line: [log of each seed]} as ends of logs, cut to the questions that all of them ask."""
    ends = {line: [(rows[0], rows[-1]) for rows in map(probed, of)] for line, of in logs.items()}
    rows = [row for of in ends.values() for both in of for row in both]
    asked = {x: min(len(row[x]) for row in rows) for x in ("margins_in", "margins_out")}
    return {line: [[row | {x: row[x][:n] for x, n in asked.items()} for row in both]
                   for both in of] for line, of in ends.items()}


def probed(log):
    """The log's rows that say what the probe was answered."""
    return [row for row in log if "margins_out" in row]


def mean_log(logs):
    """The seeds' logs as one: each question's margin at the start and at the end, averaged."""
    ends = []
    for rows in zip(*logs, strict=True):
        row = {"heldout_loss": statistics.fmean(row["heldout_loss"] for row in rows)}
        for x in ("margins_in", "margins_out"):
            by_question = zip(*(row[x] for row in rows), strict=True)
            row[x] = [statistics.fmean(values) for values in by_question]
        ends.append(row)
    return ends


def with_se(mean, se):
    return f"{mean:+.3f} ({se:.3f})"


def table(name, logs):
    """Prints and draws each line's loss and margins.    logs: {line: [log of each seed]}."""
    logs = same_questions(logs)
    controls = [x for x in ("aligned", "shuffled") if x in logs]
    print(f"\n{'':34} {'held out':>8} {'finance':>15} {'general':>15}  "
          + "".join(f"{f'less {x}':>15}  " for x in controls) + "general, by seed")
    means = {line: mean_log(of) for line, of in logs.items()}
    for line, mean in means.items():
        loss = mean[-1]["heldout_loss"]
        cells = [with_se(*data.mean_and_se(data.changes(mean, x))) for x in ("in", "out")]
        for x in controls:
            cells.append("" if x == line else with_se(*data.contrast(mean, means[x], "out")))
        by_seed = [data.mean_and_se(data.changes(log, "out"))[0] for log in logs[line]]
        seeds = " ".join(f"{change:+.3f}" for change in by_seed)
        print(f"{line:34} {loss:8.3f} " + " ".join(f"{cell:>15}" for cell in cells[:2]) + "  "
              + "".join(f"{cell:>15}  " for cell in cells[2:]) + seeds)
    sizes = [len(mean[0][x]) for x in ("margins_in", "margins_out")]
    print(f"({sizes[0]} finance questions, {sizes[1]} general ones)")
    draw_ends(os.path.join("runs", f"{name}.png"), logs)


def draw_ends(path, logs):
    """A dot a line, with twice its standard error; small ones are the seeds."""
    with figure_in(path, 1, 2, (7, 1.2 + 0.24 * len(logs)), sharey=True) as axes:
        for axis, colour, x in zip(axes, analyze.COLOURS, ("in", "out"), strict=False):
            for i, of in enumerate(logs.values()):
                mean, se = data.mean_and_se(data.changes(mean_log(of), x))
                axis.errorbar(mean, -i, xerr=2 * se, fmt="o", color=colour)
                seeds = [data.mean_and_se(data.changes(log, x))[0] for log in of]
                axis.plot(seeds, [-i] * len(seeds), ".", color="black", markersize=3)
            axis.axvline(0, color="gray", linewidth=0.8)
            axis.locator_params(axis="x", nbins=4)  # more would run into the next panel's
            axis.set(title=f"margin, {NAMES[x]}", xlabel="change, nats per token")
        axes[0].set_yticks(range(0, -len(logs), -1), logs)


def draw_courses(path, logs):
    """The margins over training, and against each other: a line a protocol, the seeds' means."""
    with figure_in(path, 1, 3, (11, 3.8)) as (finance, general, portrait):
        for i, (name, of) in enumerate(logs.items()):
            steps, at = [row["step"] for row in probed(of[0])], {}
            for x in ("in", "out"):
                margins = [[row[f"margin_{x}"] for row in probed(log)] for log in of]
                means = list(map(statistics.fmean, zip(*margins, strict=True)))
                at[x] = [mean - means[0] for mean in means]
            style = {"color": analyze.COLOURS[i % 7], "linestyle": ["-", ":"][i // 7],
                     "marker": analyze.MARKERS[i], "markersize": 4}
            for axis, x, y in ((finance, steps, at["in"]), (general, steps, at["out"]),
                               (portrait, at["in"], at["out"])):
                axis.plot(x, y, label=name, **style)
        finance.set(title="finance margin", xlabel="step", ylabel="change, nats per token")
        general.set(title="general margin", xlabel="step")
        portrait.set(title="phase portrait", xlabel="finance", ylabel="general")
        portrait.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_turns(path, runs):
    """The gradient's norm and A's local cosine over training: a line a run."""
    with figure_in(path, 1, 2, (9, 3.4)) as (gradient, turning):
        for i, (name, of) in enumerate(runs.items()):
            for label, run in zip([name] + [None] * len(of), of, strict=False):
                style = {"color": analyze.COLOURS[i], "linewidth": 1, "label": label}
                log = read_log(run)[1:]
                gradient.plot([r["step"] for r in log], [r["grad_norm"] for r in log], **style)
                steps, vectors = analyze.read_checkpoints(run)
                turning.plot(steps, analyze.local_cosine(vectors["A"], 1), **style)
        gradient.set(title="gradient norm", xlabel="step")
        turning.set(title="local cosine of A (-1: straight on)", xlabel="step")
        gradient.legend()


@contextlib.contextmanager
def figure_in(path, rows, columns, size, **kwargs):
    """Gives the axes of a figure, which is written afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(analyze.STYLE)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **kwargs)
    yield axes
    figure.savefig(path, dpi=80)
    print(f"see {path}")


if __name__ == "__main__":
    data.run_stage(main)
