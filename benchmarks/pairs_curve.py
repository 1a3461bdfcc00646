"""Figure 4 on the embedded world: what rDPO gains with 30 to 480 pictures to make pairs from, three seeds, evaluation scenes that nothing was trained or tuned on.

    python benchmarks/pairs_curve.py FOLDER [--images 30 60 120 240 480] [--seeds 0 1 2] [--workers 1]

Every size is a run of its own under FOLDER, with the library's defaults; the pictures of a smaller run are among those of a larger one. A second
call continues. Writes benchmarks/results/pairs_curve.json: for every size the number of pairs, and the gain over the model before training in each
metric, with its 95 % interval (whole images resampled) and its spread over seeds; and what every size of the first seed says about the first scenes.
"""
import argparse, json
from pathlib import Path

from realign_nb.arms import TrainSettings
from realign_nb.cli import do_arms
from realign_nb.results import EvalSettings, answers_of, report_data, versions
from realign_nb.stages import PairsSettings, make_pairs

METRICS = {"pope": ("random/accuracy", "popular/accuracy", "adversarial/accuracy", "mean/accuracy", "mean/f1"), "chair": ("chair_i", "recall")}
SHOWN = 12                  # scenes whose descriptions are kept


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--images", type=int, nargs="+", default=[30, 60, 120, 240, 480])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--scenes", type=int, default=400)
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pairs_curve.json")
    a, points = p.parse_args(), []
    said = {}
    on = EvalSettings(n_scenes=a.scenes)
    for n in a.images:
        run = a.folder / f"images-{n}"
        pairs, _ = make_pairs(run, PairsSettings(n_images=n))
        do_arms(str(run), ["rdpo"], a.seeds, a.workers, TrainSettings(), on)
        c = next(c for c in report_data(run, on)["comparisons"] if (c["a"], c["b"]) == ("rdpo", "base"))
        points.append(dict(images=n, pairs=len(pairs), **{k: {f"{b}:{m}": (c[b][k] or {}).get(m) for b, ms in METRICS.items() for m in ms} for k in ("difference", "intervals", "spread", "p")}))
        print(n, "images,", len(pairs), "pairs:", {m: round(v, 4) for m, v in points[-1]["difference"].items()}, flush=True)
        base = {f"{b}:{m}": c[b]["b"][m] for b, ms in METRICS.items() for m in ms}
        for arm, seed, name in (("base", 0, "base"), ("rdpo", a.seeds[0], str(n))):
            said[name] = dict(list(sorted(answers_of(run / "eval" / f"{arm}-seed{seed}", "describe").items()))[:SHOWN])
        a.out.write_text(json.dumps(dict(scenes=on.n_scenes, seeds=a.seeds, base=base, points=points, answers=said, versions=versions()), indent=1) + "\n")


if __name__ == "__main__": main()
