"""What holds for every benchmark: order and shards change nothing, right answers give the maximum, one answer is one count, faults are counted."""
import json
import random

import pytest

from realign_nb.bench import FAMILIES, compare, find_benchmark, records, score

CATEGORIES = ("existence count position color posters celebrity scene landmark artwork OCR "
              "commonsense_reasoning numerical_calculation text_translation code_reasoning").split()
KINDS = ["dog", "cat", "cup", "bus"]
NEEDED = {"benchmark", "rule", "scale", "n", "units", "metrics", "intervals", "interval", "missing", "duplicate", "unmatched", "unparsable", "ids", "data_sha256"}


def yes(flag): return "Yes" if flag else "No"


def pope():
    items = [dict(question_id=n, image=f"{n // 3}.jpg", text="Is there a dog?", label=yes(n % 2).lower(), category=("random", "popular", "adversarial")[n % 3]) for n in range(30)]
    return items, [dict(question_id=i["question_id"], text=i["label"].title()) for i in items]


def mme():
    items = [dict(question_id=f"{c}/{k}/{q}", category=c, image=f"{k}.png", question=f"question {q}", answer=yes(q)) for c in CATEGORIES for k in range(2) for q in range(2)]
    return items, [dict(question_id=i["question_id"], text=i["answer"]) for i in items]


def hallusionbench():
    items = [dict(category=c, subcategory="chart", visual_input=str(v), set_id=str(s), figure_id=str(f), question_id=str(q), question="?", gt_answer=str(q % 2), gt_answer_details="",
                  filename="x.png" if v else None) for c in ("VD", "VS") for s in range(2) for f, v in enumerate((0 if c == "VS" else 1, 2)) for q in range(2)]
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return items, [{k: i[k] for k in keys} | dict(reply="correct", run=0, judge="a judge") for i in items]


def scienceqa():
    items = [dict(question_id=str(n), question="?", choices=["a", "b", "c"], answer=n % 3, hint="", image="x.png" if n % 2 else None, subject="natural science", grade="grade3") for n in range(20)]
    return items, [dict(question_id=i["question_id"], text="ABC"[i["answer"]]) for i in items]


def mmbench():
    items = [dict(index=q + k * 10**6, question="?", hint="", A="one", B="two", C="three", D="four", answer="ABCD"[(q + k) % 4], category="shape", **{"l2-category": "form"}) for q in range(6) for k in range(4)]
    return items, [dict(index=i["index"], prediction=i["answer"]) for i in items]


def textvqa():
    items = [dict(question_id=n, image_id=f"im{n // 2}", image=f"im{n // 2}.jpg", question="?", answers=["nike"] * 10, answer_type="other") for n in range(20)]
    return items, [dict(question_id=i["question_id"], text="Nike.") for i in items]


def vizwiz():
    items = [dict(image=f"{n}.jpg", question="?", answers=[dict(answer="soup", answer_confidence="yes")] * 10, answer_type="other") for n in range(20)]
    return items, [dict(image=i["image"], text="Soup") for i in items]


def mmvet():
    items = [dict(question_id=f"v1_{n}", image=f"{n}.jpg", question="?", answer="a", capability=["rec", "ocr"][:1 + n % 2]) for n in range(20)]
    return items, [dict(question_id=i["question_id"], reply="1.0", run=0, judge="a judge") for i in items]


def llavabench():
    items = [dict(question_id=n, image=f"{n}.jpg", text="?", category=f"llava_bench_{('conv', 'detail', 'complex')[n % 3]}") for n in range(30)]
    return items, [dict(question_id=i["question_id"], reply="8 8", run=0, judge="a judge") for i in items]


def chair():
    items = [dict(image_id=n, image=f"{n}.jpg", objects=[KINDS[n % 4], KINDS[(n + 1) % 4]], kinds=KINDS) for n in range(20)]
    return items, [dict(image_id=i["image_id"], caption=" and ".join(i["objects"])) for i in items]


# benchmark -> (items and right predictions, metric, its value for right answers, answer field, a wrong answer, what one wrong answer changes)
CASES = dict(
    pope=(pope, "random/accuracy", 1, "text", lambda i: yes(i["label"] == "no"), -1 / 10), mme=(mme, "perception", 2000, "text", lambda i: yes(i["answer"] == "No"), -(25 + 50)),
    hallusionbench=(hallusionbench, "a", 100, "reply", lambda i: "incorrect", -100 / 16), scienceqa=(scienceqa, "accuracy", 100, "text", lambda i: "ABC"[i["answer"] - 1], -100 / 20),
    mmbench=(mmbench, "circular", 100, "prediction", lambda i: "ABCD"["ABCD".index(i["answer"]) - 1], -100 / 6), textvqa=(textvqa, "accuracy", 100, "text", lambda i: "adidas", -100 / 20),
    vizwiz=(vizwiz, "accuracy", 100, "text", lambda i: "unanswerable", -100 / 20), mmvet=(mmvet, "total", 100, "reply", lambda i: "0.0", -100 / 20),
    llavabench=(llavabench, "all", 100, "reply", lambda i: "8 2", -100 * 6 / 8 / 30), chair=(chair, "chair_s", 0, "caption", lambda i: "A " + next(k for k in KINDS if k not in i["objects"]), 1 / 20))
JUDGED = [b for b in CASES if find_benchmark(b).judged]


def flipped(benchmark, *positions):
    make, _, _, field, wrong, _ = CASES[benchmark]
    items, said = make()
    for n in positions: said[n] = said[n] | {field: wrong(items[n])}
    return items, said


def test_every_benchmark_is_here():
    assert set(CASES) == set(FAMILIES) and JUDGED == ["hallusionbench", "mmvet", "llavabench"]


@pytest.mark.parametrize("benchmark", CASES)
def test_right_answers_give_the_maximum_and_all_that_a_score_names(benchmark):
    make, metric, best, *_ = CASES[benchmark]
    s = score(benchmark, *make())
    assert NEEDED <= set(s) and s["metrics"][metric] == pytest.approx(best) and json.loads(json.dumps(s, allow_nan=False)) == s
    assert [s[k] for k in ("missing", "duplicate", "unmatched", "unparsable")] == [0] * 4 and s.get("unjudged", 0) == 0 and len(s["data_sha256"]) == 64
    assert s["scale"] == find_benchmark(benchmark).scale and (benchmark != "mme" or s["metrics"]["cognition"] == 800)


@pytest.mark.parametrize("benchmark", CASES)
@pytest.mark.parametrize("position", [0, 3])
def test_one_wrong_answer_moves_the_count_by_one(benchmark, position):
    _, metric, best, *_, step = CASES[benchmark]
    assert score(benchmark, *flipped(benchmark, position))["metrics"][metric] == pytest.approx(best + step)


@pytest.mark.parametrize("benchmark", CASES)
def test_order_and_shards_change_nothing(benchmark):
    items, said = flipped(benchmark, 0, 3, 6)
    whole, rng = score(benchmark, items, said), random.Random(0)
    for _ in range(3):
        shards = [said[n::3] for n in rng.sample(range(3), 3)]
        assert score(benchmark, rng.sample(items, len(items)), sum((rng.sample(s, len(s)) for s in shards), [])) == whole
    assert sorted(map(str, records(benchmark, items, said))) == sorted(map(str, records(benchmark, items[::-1], said[::-1])))


@pytest.mark.parametrize("benchmark", CASES)
def test_faults_are_counted_and_named(benchmark):
    items, said = flipped(benchmark)
    key = next(k for k in find_benchmark(benchmark).keys if all(f in said[0] for f in k))
    s = score(benchmark, items, said[2:] + said[5:6] + [said[0] | {key[-1]: "nobody"}])
    assert [s[k] for k in ("n", "missing", "duplicate", "unmatched", "unparsable")] == [len(items), 2, 1, 1, 0]
    assert {k: len(v) for k, v in s["ids"][0].items() if k != "unjudged"} == dict(missing=2, duplicate=1, unmatched=1)
    assert s.get("unjudged", 0) == 2 * (benchmark in JUDGED)


@pytest.mark.parametrize("benchmark", CASES)
def test_a_missing_answer_is_never_better_than_a_wrong_one(benchmark):
    _, metric, best, *_ = CASES[benchmark]
    items, said = flipped(benchmark, 0)
    with_it, without = (score(benchmark, items, p)["metrics"][metric] for p in (said, said[1:]))
    if benchmark in JUDGED or benchmark == "chair": assert without == pytest.approx(best)              # no verdict, no caption: not part of the share, and reported
    else: assert without == pytest.approx(with_it)


@pytest.mark.parametrize("benchmark", CASES)
def test_a_comparison_is_signed_and_with_itself_nothing(benchmark):
    _, metric, _, *_, step = CASES[benchmark]
    (items, right), (_, wrong) = flipped(benchmark), flipped(benchmark, 0)
    c, back, none = compare(benchmark, items, wrong, right), compare(benchmark, items, right, wrong), compare(benchmark, items, wrong, wrong)
    assert c["difference"][metric] == pytest.approx(step) == pytest.approx(-back["difference"][metric])
    assert none["difference"][metric] == 0 and none["p"][metric] == 1 == none["p_holm"][metric] and json.loads(json.dumps(c, allow_nan=False)) == c


@pytest.mark.parametrize("benchmark", CASES)
def test_records_show_what_every_rule_reads(benchmark):
    items, said = flipped(benchmark, 1)
    found, b = records(benchmark, items, said[1:]), find_benchmark(benchmark)
    assert len(found) == len(items) and sum(r["text"] is None for r in found) == 1
    assert all(b.rules[0] in r["parse"] for r in found) and all(v is None for r in found if r["text"] is None for v in r["parse"].values())
    judgements = [r["right"] for r in found if r["text"] is not None]
    if None not in judgements: assert judgements.count(False) == 1


@pytest.mark.parametrize("benchmark", JUDGED)
def test_a_failed_judge_is_no_score(benchmark):
    _, metric, best, field, wrong, step = CASES[benchmark]
    items, said = flipped(benchmark, 3)
    unread = benchmark != "hallusionbench"                                 # there the official script reads every reply, at worst as unclear
    broken = [said[0] | dict(reply=None, failed="timeout"), said[1] | dict(reply="I cannot help with that" if unread else None), *said[2:]]
    s = score(benchmark, items, broken)
    assert (s["unjudged"], s["unparsable"], s["missing"]) == (2, int(unread), 0) and len(s["ids"][0]["unjudged"]) == 2
    assert 0 < s["metrics"][metric] < best and s["judge"] == "a judge"
    with pytest.raises(ValueError, match="2 judges"): score(benchmark, items, [said[0] | dict(judge="another"), *said[1:]])
    assert compare(benchmark, items, broken, said)["left_out"] == 2


@pytest.mark.parametrize("benchmark", JUDGED)
def test_runs_of_a_judge_are_scored_one_by_one(benchmark):
    _, metric, best, *_ = CASES[benchmark]
    items, good = flipped(benchmark)
    _, bad = flipped(benchmark, 0)
    s = score(benchmark, items, good + [r | dict(run=1) for r in bad])
    each = [score(benchmark, items, r)["metrics"][metric] for r in (good, bad)]
    assert s["runs"] == 2 and [r[metric] for r in s["per_run"]] == each
    assert s["metrics"][metric] == pytest.approx(sum(each) / 2) and s["spread"][metric] == pytest.approx((each[0] - each[1]) / 2)
