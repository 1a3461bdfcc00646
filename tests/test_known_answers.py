"""Published answers of LLaVA-1.5 through the command line: the official numbers, and what each rule reads record by record."""
import contextlib
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from published import HERE, known_file
from realign_nb.eval_cli import main_eval

sys.path.insert(0, str(HERE))
import convert  # noqa: E402


def run(*argv):
    "Exit status and what was printed."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()): status = main_eval([str(a) for a in argv])
    return status, out.getvalue()


def scored(name, tmp_path, *more, model=None):
    "The score of one compact file, as printed by `realign-eval score --json`."
    items, predictions = convert.write(known_file(f"{name}.json"), tmp_path, model)
    status, out = run("score", convert.FILES[name].__name__, "--items", items, "--predictions", predictions, "--json", *more)
    assert status == 0
    s = json.loads(out)
    assert [s[k] for k in ("missing", "duplicate", "unmatched")] == [0, 0, 0] and s["interval"].startswith("95 %") and s["rule"]
    return s


def test_the_copies_are_those_of_the_readme():
    sums = dict(map(reversed, re.findall(r"\| `(\w{64})` \| `(\S+)` \|", (HERE / "README.md").read_text())))
    assert {f"{n}.json" for n in convert.FILES} == set(sums)
    copies = sorted(p.name for p in HERE.glob("*.json"))
    assert not {"mme_llava15_13b.json", "scienceqa_llava15_13b.json"} & set(copies) and len(copies) == 5
    for folder in filter(None, (HERE, os.environ.get("REALIGN_KNOWN_ANSWERS"))):
        for p in Path(folder).glob("*.json"): assert p.name not in sums or hashlib.sha256(p.read_bytes()).hexdigest() == sums[p.name]


def test_pope(tmp_path):
    s = scored("pope_llava15_13b", tmp_path)
    m = s["metrics"]
    assert [round(m[f"{x}/accuracy"], 5) for x in ("random", "popular", "adversarial")] == [.88007, .87433, .85500] and s["n"] == 8910
    assert round(100 * m["mean/f1"], 1) == 85.9 and round(m["mean/f1"], 4) == .8595
    for rule in ("lmms_eval", "vlmevalkit"): assert scored("pope_llava15_13b", tmp_path, "--rule", rule)["metrics"] == m       # tidy answers: the rules agree
    assert all(lo < m[k] < hi for k, (lo, hi) in s["intervals"].items())


def test_mme(tmp_path):
    s = scored("mme_llava15_13b", tmp_path)
    assert (round(s["metrics"]["perception"], 2), round(s["metrics"]["cognition"], 2)) == (1531.32, 295.36) and (s["n"], s["units"]) == (2374, 1187)


def test_scienceqa(tmp_path):
    s = scored("scienceqa_llava15_13b", tmp_path)
    assert (round(s["metrics"]["accuracy"], 2), round(s["metrics"]["image_accuracy"], 2)) == (74.39, 71.64)
    assert (s["right"]["n"], s["n"]) == (3155, 4241) and s["metrics"]["image_accuracy"] == pytest.approx(100 * 1445 / 2017)
    only = scored("scienceqa_llava15_13b", tmp_path, "--image-only")
    assert (only["right"]["n"], only["n"], only["metrics"]["accuracy"]) == (1445, 2017, s["metrics"]["image_accuracy"])


def test_mmbench(tmp_path):
    s = scored("mmbench_dev_20230712_llava15_13b", tmp_path)
    assert (round(s["metrics"]["circular"], 2), round(s["metrics"]["vanilla"], 2)) == (67.69, 75.43) and (s["n"], s["units"]) == (4377, 1176)


def test_mmvet(tmp_path):
    s = scored("mmvet_llava15_grades", tmp_path, model="7b")
    assert [round(r["total"], 1) for r in s["per_run"]] == [31.2, 30.8, 31.2] and s["n"] == 218 and s["unjudged"] == 0
    assert (round(s["metrics"]["total"], 1), round(s["spread"]["total"], 1), s["judge"]) == (31.1, .2, "gpt-4-0613")


@pytest.mark.parametrize("model, total", [("7b", 65.4), ("13b", 72.5)])
def test_llavabench(tmp_path, model, total):
    s = scored("llavabench_llava15_reviews", tmp_path, model=model)
    assert round(s["metrics"]["all"], 1) == total and (s["n"], s["runs"], s["judge"]) == (60, 3, "gpt-4-0314")
    if model == "7b": assert [r["all"] for r in s["per_run"]] == [64.7, 65.3, 66.3]


def test_vizwiz_uploads_are_reproduced(tmp_path):
    rows = json.loads(known_file("vizwiz_llava15_13b_normalised.json").read_text())["rows"]
    s = scored("vizwiz_llava15_13b_normalised", tmp_path, "--records", tmp_path / "records.jsonl")
    read = {r["id"]: r["parse"]["llava"] for r in map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())}
    assert s["n"] == 2060 and s["metrics"]["accuracy"] == 100
    assert [n for n, (_, uploaded) in enumerate(rows) if read[f"{n}.jpg"] != uploaded] == []


def test_parts_and_order_of_the_files_change_nothing(tmp_path):
    items, predictions = convert.write(known_file("mmvet_llava15_grades.json"), tmp_path, "7b")
    whole, lines = run("score", "mmvet", "--items", items, "--predictions", predictions, "--json"), predictions.read_text().splitlines(True)
    for n in range(3): (tmp_path / f"part{n}.jsonl").write_text("".join(lines[n::3][::-1]))
    items.write_text("".join(items.read_text().splitlines(True)[::-1]))
    assert run("score", "mmvet", "--items", items, "--predictions", *(tmp_path / f"part{n}.jsonl" for n in (2, 0, 1)), "--json") == whole


@pytest.mark.parametrize("kind", ["json", "tsv", "csv"])
def test_every_kind_of_file(tmp_path, kind):
    import csv
    items, predictions = convert.write(known_file("mmbench_dev_20230712_llava15_13b.json"), tmp_path)
    whole, other = run("score", "mmbench", "--items", items, "--predictions", predictions, "--json"), []
    for f in (items, predictions):
        rows = [json.loads(x) for x in f.read_text().splitlines()]
        other.append(f.with_suffix("." + kind))
        if kind == "json": other[-1].write_text(json.dumps(rows)); continue
        with open(other[-1], "w", newline="") as out:
            w = csv.DictWriter(out, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            w.writeheader(); w.writerows(rows)
    status, out = run("score", "mmbench", "--items", other[0], "--predictions", other[1], "--json")
    assert (status, out) == whole


def test_a_comparison_of_two_published_models(tmp_path):
    (items, b), (_, a) = convert.write(known_file("llavabench_llava15_reviews.json"), tmp_path / "7b", "7b"), convert.write(known_file("llavabench_llava15_reviews.json"), tmp_path / "13b", "13b")
    status, out = run("compare", "llavabench", "--items", items, "--a", a, "--b", b, "--json")
    d = json.loads(out)
    assert status == 0 and round(d["difference"]["all"], 1) == 7.1 and d["intervals"]["all"][0] > 0 and d["p"]["all"] < .01 and d["left_out"] == 0


def test_an_answer_without_a_verdict_needs_permission(tmp_path):
    items, records = convert.write(known_file("mmvet_llava15_grades.json"), tmp_path, "7b")
    lines = [json.loads(x) for x in records.read_text().splitlines()]
    lines[0]["reply"], lines[1]["reply"] = None, "nan"
    records.write_text("".join(json.dumps(x) + "\n" for x in lines))
    strict = run("score", "mmvet", "--items", items, "--predictions", records, "--json")
    assert strict[0] == 1 and json.loads(strict[1])["unjudged"] == 2
    assert run("score", "mmvet", "--items", items, "--predictions", records, "--json", "--allow-unjudged") == (0, strict[1])
