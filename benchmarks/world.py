"""The reported comparison on the embedded world: five arms, three seeds, evaluation scenes that nothing was trained or tuned on.

    python benchmarks/world.py FOLDER [--workers 2]

The settings are the library's defaults, chosen by tune_world.py. Run once; a second call continues. Writes benchmarks/results/world.json
(scores with intervals, paired comparisons, findings in words, wall time of each arm) and leaves the full report in FOLDER/report.
"""
import argparse, json
from pathlib import Path

from realign_nb.arms import ARMS, TrainSettings
from realign_nb.cli import do_arms
from realign_nb.findings import summary
from realign_nb.report import report
from realign_nb.results import EvalSettings, report_data, versions
from realign_nb.stages import PairsSettings, make_pairs


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path); p.add_argument("--workers", type=int, default=2)
    a, seeds, on = p.parse_args(), [0, 1, 2], EvalSettings()
    pairs, misses = make_pairs(a.folder, PairsSettings())
    do_arms(str(a.folder), list(ARMS), seeds, a.workers, TrainSettings(), on)
    data = report_data(a.folder, on)
    report(data, a.folder / "report")
    keep = ("n", "images", "metrics", "intervals", "per_seed", "spread", "missing", "duplicate", "unparsable", "rule", "data_sha256")
    scores = {arm: {b: {k: s[k] for k in keep if k in s} for b, s in runs["all"].items()} for arm, runs in data["scores"].items()}
    out = Path(__file__).parent / "results" / "world.json"
    out.write_text(json.dumps(dict(pairs=len(pairs), misses=len(misses), seeds=seeds, scenes=on.n_scenes, findings=summary(data), scores=scores,
                                   comparisons=data["comparisons"], seconds=data["seconds"], versions=versions()), indent=1) + "\n")
    print(*summary(data), sep="\n\n")


if __name__ == "__main__": main()
