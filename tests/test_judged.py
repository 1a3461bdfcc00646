"""MM-Vet and LLaVA-Bench from judge replies: the traps of their official rules, and the published runs."""
import json, math, random

import pytest

from published import known_file
from realign_nb.bench import find_benchmark, parse, records, score
from realign_nb.judged import BENCHMARKS, CATEGORIES, over_runs, read_grade, read_pair


def known(name): return json.loads(known_file(name).read_text(encoding="utf-8"))


def vet(n=8):
    caps = [["rec"], ["ocr", "math"], ["rec", "know", "gen"], "ocr,spat"]
    return [dict(question_id=f"v1_{k}", image=f"{k // 2}.jpg", capability=caps[k % 4]) for k in range(n)]


def wild(n=9): return [dict(question_id=k, image=f"{k // 3:03}.jpg", category=("conv", "llava_bench_detail", "complex")[k % 3]) for k in range(n)]


def said(items, replies, run=0): return [dict(question_id=i["question_id"], reply=r, run=run, judge="judge-a") for i, r in zip(items, replies)]


# ---- reading

@pytest.mark.parametrize("reply, grade", [("0.5", .5), ("1", 1.), ("0", 0.), ("0.5 since half is there", .5), ("1.0\n", 1.), ("\n0.3", .3), (".5", .5),
    ("nan", None), ("NaN", None), ("inf", None), ("-inf", None), ("-0.1", None), ("1.1", None), ("10", None), ("", None), (" ", None), (" 0.5", None), ("0.5.", None), ("0.5,", None),
    ("0,5", None), ("Correctness: 0.5", None), ("half", None), ("0_1", None), ("I'm sorry, but I can't", None), ("0.5|1.0", None)])
def test_a_grade_is_a_number_from_0_to_1_before_the_first_blank(reply, grade):
    assert read_grade(reply) == grade == parse("mmvet", reply)


@pytest.mark.parametrize("reply, strict, lenient", [("8 7", [8, 7], [8, 7]), ("8 7.5\nAssistant 1 ...", [8, 7.5], [8, 7.5]), ("8,7", [8, 7], [8, 7]), ("8, 7", None, [8, 7]), ("8  7", None, [8, 7]),
    ("8 7 ", None, [8, 7]), (" 8 7", None, [8, 7]), ("\n8 7", None, [8, 7]), ("8 7 9", None, [8, 7]), ("8", None, None), ("8\n7", None, [8, 7]), ("8/10 7/10", None, [8, 10]), ("Scores: 8 and 7", None, [8, 7]),
    ("Assistant 1: 8, Assistant 2: 7", None, [1, 8]), ("-1 -1", None, None), ("nan 8", None, None), ("8 nan", None, None), ("inf 8", None, None), ("85 90", None, None), ("11 8", None, None), ("0 8", [0, 8], [0, 8]), ("", None, None),
    ("Both are good.", None, None), ("I'm sorry, but I can't", None, None)])
def test_a_review_is_two_numbers_in_its_first_line(reply, strict, lenient):
    assert (read_pair(reply), read_pair(reply, "lenient")) == (strict, lenient)
    assert (parse("llavabench", reply), parse("llavabench", reply, "lenient")) == (strict, lenient)


# ---- MM-Vet

def test_mmvet_counts_in_the_total_in_each_capability_and_in_the_exact_combination():
    items = vet(4); m = score("mmvet", items, said(items, ["1.0", "0.5", "0.2", "0.0"]))["metrics"]
    assert m == pytest.approx(dict(total=42.5, rec=60, ocr=25, know=20, gen=20, spat=0, math=50) | {"only rec": 100, "only ocr+math": 50, "only rec+know+gen": 20, "only ocr+spat": 0})
    assert list(m)[:7] == ["total", "rec", "ocr", "know", "gen", "spat", "math"]


def test_a_failed_call_is_never_a_score():
    items = vet(4); s = score("mmvet", items, said(items, ["1.0", None, "nan", ""]))
    assert s["metrics"]["total"] == 100 and s["unjudged"] == 3 and set(s["ids"][0]["unjudged"]) == {"v1_1", "v1_2", "v1_3"}
    assert s["metrics"]["math"] is None and not any(isinstance(v, float) and math.isnan(v) for v in s["metrics"].values())
    assert score("mmvet", items, said(items, [None] * 4))["metrics"]["total"] is None      # not 0, not 100
    partial = score("mmvet", items, said(items, ["1.0"]))                                   # the other three were never judged
    assert partial["metrics"]["total"] == 100 and partial["missing"] == partial["unjudged"] == 3


def test_all_right_is_100_and_one_answer_moves_the_sum_by_one():
    items = vet(); replies = ["1.0"] * 8
    full = score("mmvet", items, said(items, replies))["metrics"]
    assert set(full.values()) == {100.}
    assert score("mmvet", items, said(items, replies[:-1] + ["0.0"]))["metrics"]["total"] == pytest.approx(100 * 7 / 8)
    pairs = wild(); same = score("llavabench", pairs, said(pairs, ["8 8"] * 9))["metrics"]
    assert same == dict.fromkeys(CATEGORIES, 100.) and list(same) == CATEGORIES


def test_runs_are_scored_alone_and_averaged():
    items = vet(4); s = score("mmvet", items, said(items, ["1", "1", "0", "0"]) + said(items, ["1", "1", "1", "0"], 1) + said(items, ["1", "1", "1", None], 2))
    totals = [r["total"] for r in s["per_run"]]
    assert totals == pytest.approx([50, 75, 100]) and s["metrics"]["total"] == pytest.approx(75) and s["spread"]["total"] == pytest.approx(20.412, abs=1e-3) and s["runs"] == 3
    assert over_runs(totals) == dict(mean=75., std=20.4, runs=[50., 75., 100.]) and s["unjudged"] == 1


# ---- LLaVA-Bench

def test_llavabench_is_a_ratio_of_means_not_a_mean_of_ratios():
    items = wild(3); s = score("llavabench", items, said(items, ["10 1", "1 1", "4 4"]))
    assert s["metrics"]["all"] == pytest.approx(100 * 2 / 5) and s["metrics"]["conv"] == 10 and s["metrics"]["detail"] == 100


def test_failures_stay_out_of_both_means():
    items = wild(6); replies = ["8 4", "I cannot judge.", "10 5", "8 4", None, "10 5"]
    s = score("llavabench", items, said(items, replies))
    assert s["metrics"] == dict(all=50, complex=50, conv=50, detail=None)                   # with (-1, -1) for the failures: detail 100, all 45.7 or so
    assert s["unjudged"] == 2 and s["ids"][0]["unjudged"] == ["1", "4"]
    assert score("llavabench", items, said(items, ["-1 -1"] * 6))["metrics"]["all"] is None
    assert score("llavabench", items, said(items, ["0 0"] * 6))["metrics"]["all"] is None  # nothing to divide by


def test_the_lenient_rule_is_a_second_number():
    items = wild(3); replies = ["8 4", "Scores: 8 8", "8, 8"]
    a, b = (score("llavabench", items, said(items, replies), r) for r in ("strict", "lenient"))
    assert (a["rule"], a["metrics"]["all"], a["unjudged"]) == ("strict", 50, 2) and (b["rule"], b["metrics"]["all"], b["unjudged"]) == ("lenient", 83.3, 0)
    of = records("llavabench", items, said(items, replies))
    assert of[2]["parse"] == dict(strict=None, lenient=[8., 8.]) and of[2]["text"] == "8, 8"


@pytest.mark.parametrize("benchmark, items, reply", [("mmvet", vet(), lambda r: f"{r.randrange(11) / 10}"), ("llavabench", wild(), lambda r: f"{r.randint(1, 10)} {r.randint(1, 10)}")])
def test_order_and_shards_change_nothing(benchmark, items, reply):
    rng = random.Random(3); files = [said(items, [reply(rng) for _ in items], run) for run in (0, 1)]
    whole = score(benchmark, items, sum(files, []))
    mixed = sum(files, []); rng.shuffle(mixed); again = score(benchmark, rng.sample(items, len(items)), mixed[5:] + mixed[:5])
    assert again == whole and whole["missing"] == whole["duplicate"] == whole["unjudged"] == 0


def test_records_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match="v1_0: field capability holds 'smell'"): score("mmvet", [vet(1)[0] | dict(capability=["smell"])], said(vet(1), ["1"]))
    with pytest.raises(ValueError, match="question 0: field category is 'poem'"): score("llavabench", [wild(1)[0] | dict(category="poem")], said(wild(1), ["1 1"]))
    with pytest.raises(ValueError, match="2 judges"): score("mmvet", vet(2), said(vet(1), ["1"]) + [dict(question_id="v1_1", reply="1", run=0, judge="judge-b")])


def test_the_unit_is_the_picture():
    assert all(b.judged and b.scale == "percent" and b.per == "image" for b in BENCHMARKS.values()) and find_benchmark("mmvet") is BENCHMARKS["mmvet"]
    assert score("llavabench", wild(9), said(wild(9), ["8 8"] * 9))["units"] == 3


# ---- published replies

def test_mmvet_of_llava_7b_is_31_1():
    grades = known("mmvet_llava15_grades.json")["7b_3runs"]; items = [dict(question_id=k) for k in grades]
    s = score("mmvet", items, [dict(question_id=k, reply=str(v), run=n, judge="gpt-4-0613") for k, g in grades.items() for n, v in enumerate(g)])
    assert s["n"] == 218 and over_runs([r["total"] for r in s["per_run"]]) == dict(mean=31.1, std=.2, runs=[31.2, 30.8, 31.2])
    assert round(s["metrics"]["total"], 1) == 31.1 and round(s["spread"]["total"], 1) == .2 and s["unjudged"] == 0


@pytest.mark.parametrize("model, runs, mean", [("7b", [64.7, 65.3, 66.3], 65.4), ("13b", None, 72.5)])
def test_llavabench_of_llava_is_65_4_and_72_5(model, runs, mean):
    reviews = {k: v for k, v in known("llavabench_llava15_reviews.json")["runs"].items() if k.startswith(model + "_")}
    assert len(reviews) == 3 and all(read_pair(line) == pair for rows in reviews.values() for _, _, line, pair in rows)
    items = [dict(question_id=i, category=c) for i, c, *_ in reviews[f"{model}_eval1"]]
    s = score("llavabench", items, [dict(question_id=i, reply=line, run=n, judge="gpt-4-0314") for n, rows in enumerate(reviews.values()) for i, _, line, _ in rows])
    of = over_runs([r["all"] for r in s["per_run"]])
    assert of["mean"] == mean == round(s["metrics"]["all"], 1) and (runs is None or of["runs"] == runs) and s["n"] == 60
