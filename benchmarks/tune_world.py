"""Choose the training settings of the embedded world on its tuning scenes, and write the choice down.

    python benchmarks/tune_world.py FOLDER [--workers 2]

Every arm gets the same grid and is chosen for by the same rule, fixed before any result was seen:
the highest (mean POPE accuracy - CHAIR_i), among settings whose recall is at most 2 points below the base model's.
Evaluation scenes are never touched. Writes benchmarks/results/tune_world.json.
"""
import argparse, json, shutil
from pathlib import Path

from realign_nb.arms import TrainSettings
from realign_nb.cli import do_arms
from realign_nb.results import EvalSettings, score_run, versions
from realign_nb.stages import PairsSettings, make_pairs

GRID = [dict(lr=lr, epochs=1) for lr in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)]   # 1e-5 and 3e-5 were added when the other three left most arms without an allowed setting
ARMS = ["rdpo", "dpo", "sft", "random"]


def metrics(score):
    pope, chair = score["all"]["pope"]["metrics"], score["all"]["chair"]["metrics"]
    return dict(pope=pope["mean/accuracy"], chair_i=chair["chair_i"], recall=chair["recall"], length=chair["length"])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path); p.add_argument("--workers", type=int, default=2)
    a, on = p.parse_args(), EvalSettings(split="tune", n_scenes=150)
    pairs, _ = make_pairs(a.folder / "pairs", PairsSettings())
    rows, base = [], None
    for setting in GRID:
        run = a.folder / "lr{lr:g}-epochs{epochs}".format(**setting)
        if not run.exists(): shutil.copytree(a.folder / "pairs", run)
        do_arms(str(run), ARMS, [0], a.workers, TrainSettings(**setting), on)
        scores, _ = score_run(run, on)
        base = metrics(scores["base"])
        rows += [setting | dict(arm=arm) | metrics(scores[arm]) for arm in ARMS]
        for r in rows[-len(ARMS):]: print({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}, flush=True)
    allowed = [r for r in rows if r["recall"] >= base["recall"] - .02]
    chosen = {arm: max((r for r in allowed if r["arm"] == arm), key=lambda r: r["pope"] - r["chair_i"], default=None) for arm in ARMS}
    out = Path(__file__).parent / "results" / "tune_world.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(dict(rule=__doc__.split("\n\n")[2], pairs=len(pairs), scenes=on.n_scenes, base=base, rows=rows, chosen=chosen, versions=versions()), indent=1) + "\n")
    for arm, r in chosen.items(): print(arm, r and {k: r[k] for k in ("lr", "epochs")})


if __name__ == "__main__": main()
