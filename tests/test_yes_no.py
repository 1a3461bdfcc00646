"""POPE, MME and HallusionBench: parses record by record, group counts, joins, and published scores from published answers."""
import json
import random
from collections import defaultdict

import numpy as np
import pytest

from published import known_file
from realign_nb.bench import compare, parse, score
from realign_nb.yes_no import (BENCHMARKS, MME_SUMS, SPLITS, count_hallusion, failure_kinds, hallusion_metrics, image_only, mme_metrics,
                               pope_metrics, rule_disagreement)

SUBTASKS = sum(MME_SUMS.values(), [])
KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")


def known(name): return json.loads(known_file(name).read_text(encoding="utf-8"))


# ---- parses

@pytest.mark.parametrize("text, llava, lmms_eval, vlmevalkit", [
    ("Yes", "yes", "yes", "yes"), ("yes", "yes", "yes", "yes"), ("No", "no", "no", "no"), ("no", "no", "no", "no"),
    ("No, there is none.", "no", None, "no"), ("There is no dog.", "no", None, "no"), ("It is not there", "no", None, None),
    ("NO", "yes", "no", "no"), ("No!", "yes", None, "no"), ("Nope", "yes", None, None), ("There isn't one", "yes", None, None),
    ("", "yes", None, None), ("No\n", "yes", "no", "no"), ("\nNo", "yes", "no", "no"), (" no ", "no", "no", "no"),
    ("Yes. No dog.", "yes", None, None), ("A dog. No cat.", "yes", None, "no"), ("No.", "no", None, "no"), (".No", "yes", None, "no"),
    ("No,there is", "yes", None, "no"), ("No, there is", "no", None, "no"), ("Not", "yes", None, None), ("cannot", "yes", None, None),
    ("yes and no", "no", None, None), ("yes/no", "yes", None, None), ("None", "yes", None, None), ("I know", "yes", None, None),
    ("**Yes**", "yes", None, None), ('"No"', "yes", None, "no"), ("Answer:no", "yes", None, None), ("Answer: no", "no", None, "no"),
    ("YES!", "yes", None, "yes"), ("Yes.It is", "yes", None, None), ("no.5", "no", None, None),
    ("a/no /b", "yes", None, None), ("a/no/b", "yes", None, "no"), ("1,000/no", "yes", None, None)])
def test_pope_parses(text, llava, lmms_eval, vlmevalkit):
    assert [parse("pope", text, r) for r in ("llava", "lmms_eval", "vlmevalkit")] == [llava, lmms_eval, vlmevalkit]


@pytest.mark.parametrize("text, llava, lmms_eval", [
    ("Yes", "yes", "yes"), ("yes", "yes", "yes"), ("No", "no", "no"), ("NO!", "no", "no"), ("No\n", "no", "no"), ("yes\n", "yes", "yes"),
    ("None", "no", "no"), ("Now", "no", "no"), ("know", "no", "no"), ("Nope", "no", "no"), ("not correct", "no", "no"), ("unknown", None, None),
    ("I know", None, None), ("isn't", None, None), ("", None, None), ("Church", None, None), ("Eyes", "yes", "yes"), ("yesno", "yes", "yes"),
    ("y", None, "yes"), ("N", None, "no"), ("n.", None, "no"), ("Y.", None, "yes"), ("  no", "no", "no"), ("    no", None, "no"),
    ("...no", None, "no"), ("...yes", None, "yes"), ("nn", None, None), ("The answer is no", None, None)])
def test_mme_parses(text, llava, lmms_eval):
    assert [parse("mme", text, r) for r in ("llava", "lmms_eval")] == [llava, lmms_eval]


@pytest.mark.parametrize("reply, verdict", [
    ("correct", 1), ("Correct", 1), ("incorrect", 0), ("INCORRECT.", 0), ("not correct", 1), ("wrong", 2), ("unclear", 2), ("Output: correct", 1),
    ("It is correct, not incorrect", 0), ("I cannot judge this", 2), ("", None), (" \n", None)])
def test_verdicts(reply, verdict):
    assert parse("hallusionbench", reply) == verdict


# ---- POPE

def pope(sizes=(30, 40, 50)):
    items = [dict(question_id=f"{s}{n}", image=f"{n // 6}.png", text="Is there a dog?", label="yes" if n % 2 else "no", category=s)
             for s, size in zip(SPLITS, sizes) for n in range(size)]
    return items, [dict(question_id=i["question_id"], text="Yes" if i["label"] == "yes" else "No") for i in items]


def test_pope_takes_the_number_of_questions_from_the_data():
    items, right = pope((2910, 3000, 3000))
    wrong = [p | dict(text="No" if p["text"] == "Yes" else "Yes") for p in right[:345]] + right[345:]
    s = score("pope", items, wrong)
    assert s["n"] == 8910 and s["metrics"]["random/accuracy"] == 2565 / 2910 and round(100 * s["metrics"]["random/accuracy"], 2) == 88.14
    items, right = pope((3000, 3000, 3000))
    assert score("pope", items, right[:2910] + right[3000:])["metrics"]["random/accuracy"] == 2910 / 3000


def test_pope_is_joined_by_id_and_not_by_position():
    items, right = pope()
    s, rng = score("pope", items, right), random.Random(0)
    assert score("pope", items, rng.sample(right, len(right))) == s and set(s["metrics"][f"{x}/accuracy"] for x in SPLITS) == {1}
    swapped = [p | dict(text=q["text"]) for p, q in zip(right, right[1:] + right[:1])]          # every answer one line too late
    assert score("pope", items, swapped)["metrics"]["mean/accuracy"] == 0


@pytest.mark.parametrize("says, expected", [("No", dict(accuracy=.5, precision=0, recall=0, f1=0, yes_ratio=0)),
                                            ("Yes", dict(accuracy=.5, precision=.5, recall=1, f1=2 / 3, yes_ratio=1))])
def test_pope_of_one_answer_has_no_zero_division(says, expected):
    items, right = pope()
    m = score("pope", items, [p | dict(text=says) for p in right])["metrics"]
    assert {k: m[f"random/{k}"] for k in expected} == pytest.approx(expected)
    assert m["mean/f1"] == pytest.approx(expected["f1"])


def test_pope_without_any_answer_of_a_label():
    items, right = pope()
    no = [i for i in items if i["label"] == "no"]
    m = score("pope", no, [p for p in right if p["text"] == "No"])["metrics"]
    assert (m["random/accuracy"], m["random/recall"], m["random/f1"]) == (1, 0, 0)


def test_what_a_rule_cannot_read_is_wrong_and_counted():
    items, right = pope()
    wordy = [p | dict(text="I think so") for p in right]
    m = {r: score("pope", items, wordy, r) for r in ("llava", "lmms_eval")}
    assert m["lmms_eval"]["metrics"]["mean/accuracy"] == m["lmms_eval"]["metrics"]["mean/yes_ratio"] == 0
    assert m["llava"]["metrics"]["mean/yes_ratio"] == 1                                           # read as yes, and flagged
    assert m["llava"]["unparsable"] == m["lmms_eval"]["unparsable"] == len(items)


def test_rule_disagreement_warns_above_half_a_percent():
    items, right = pope((400, 300, 300))
    five = [p | dict(text="NO") if n < 5 else p for n, p in enumerate(right)]
    assert rule_disagreement(items, five) | dict(ids=0) == dict(n=1000, differ=5, share=.005, ids=0, warning=None)
    six = rule_disagreement(items, [p | dict(text="NO") if n < 6 else p for n, p in enumerate(right)])
    assert six["differ"] == 6 and len(six["ids"]) == 5 and "6 of 1000" in six["warning"]
    assert rule_disagreement(items, right[:10])["n"] == 10                                       # missing answers are no disagreement


# ---- MME

def mme(images=6, subtasks=SUBTASKS):
    return [dict(question_id=f"{c}/{n}/{k}", category=c, image=f"{n}.png", question=f"Question {k} about {n}?", answer=a)
            for c in subtasks for n in range(images) for k, a in enumerate(("Yes", "No"))]


def answers(items, change=lambda n, a: a):
    return [dict(question_id=i["question_id"], text=change(n, i["answer"])) for n, i in enumerate(items)]


def test_mme_maximum_and_one_flipped_answer():
    items = mme()
    best = score("mme", items, answers(items))
    assert (best["metrics"]["perception"], best["metrics"]["cognition"], best["units"]) == (2000, 800, 84)
    assert not [k for k in best["metrics"] if k.endswith("/subtasks")] and best["scale"] == "points"
    one = score("mme", items, answers(items, lambda n, a: "No" if n == 0 else a))["metrics"]
    assert one["perception"] == pytest.approx(2000 - 100 / 12 - 100 / 6) and one["cognition"] == 800
    assert (one["existence/accuracy"], one["existence/accuracy_plus"]) == pytest.approx((1100 / 12, 500 / 6))


def test_mme_pairs_by_image_and_not_by_line():
    items, rng = mme(), random.Random(1)
    said = answers(items, lambda n, a: rng.choice(["Yes", "No", "Church"]))
    by_image = defaultdict(list)
    for i, p in zip(items, said): by_image[i["category"], i["image"]].append(p["text"] == i["answer"])
    points = {c: sum(100 * sum(v) / 12 + 100 * all(v) / 6 for k, v in by_image.items() if k[0] == c) for c in SUBTASKS}
    s = score("mme", items, said)
    assert s["metrics"]["perception"] == pytest.approx(sum(points[c] for c in MME_SUMS["perception"]))
    assert s["metrics"]["cognition"] == pytest.approx(sum(points[c] for c in MME_SUMS["cognition"]))
    assert s["unparsable"] == sum(p["text"] == "Church" for p in said)
    halves = items[::2] + items[1::2]                                                            # no two questions of an image are neighbours
    assert score("mme", halves, rng.sample(said, len(said))) == s
    assert score("mme", rng.sample(items, len(items)), said[50:] + said[:50]) == s


def test_mme_joins_the_official_ids_which_both_questions_share():
    items = [i | dict(question_id=f"{i['category']}/{i['image']}") for i in mme()]
    said = [dict(question_id=i["question_id"], question=i["question"], text=i["answer"]) for i in items]
    assert score("mme", items, said[::-1])["metrics"]["perception"] == 2000
    folders = [{k: v for k, v in i.items() if k != "question_id"} for i in items]                 # the official result files: folder, image, question
    assert score("mme", folders, [dict(p, category=i["category"], image=i["image"]) for p, i in zip(said, items)])["metrics"]["cognition"] == 800


def test_mme_of_some_subtasks_says_so():
    items = mme(subtasks=["OCR", "color"])
    m = score("mme", items, answers(items))["metrics"]
    assert (m["perception"], m["perception/subtasks"]) == (400, 2) and "cognition" not in m


def test_mme_missing_prediction_is_wrong_and_odd_images_are_errors():
    items = mme()
    s = score("mme", items, answers(items)[1:])
    assert s["missing"] == 1 and s["metrics"]["perception"] == pytest.approx(2000 - 100 / 12 - 100 / 6)
    three = items + [items[0] | dict(question_id="existence/0/2")]
    for odd in (items[1:], three):
        with pytest.raises(ValueError, match=r"existence/0.png has [13] questions"): score("mme", odd, answers(items))
    assert len({i["image"] for i in items}) == 6                                                  # the same names in every subtask do not mix


# ---- HallusionBench: a file with the group structure of the official one

def hallusion():
    rng, out = random.Random(0), []
    def add(category, set_id, figure, question, visual):
        out.append(dict(category=category, subcategory=("chart", "map", "math")[set_id % 3], visual_input=visual, set_id=str(set_id), figure_id=str(figure),
                        question_id=str(question), question=f"Question {question}?", gt_answer=rng.choice("01"), gt_answer_details="Because."))
    for s, n in enumerate([3] * 77 + [2] * 23):                       # VD: 277 groups, 100 + 100 + 13 figures
        extra = [2] if 66 <= s < 77 or s >= 98 else []
        for f in [0, 1] + extra:
            for q in range(n): add("VD", s, f, q, "2" if f else "1")
    for s, n in enumerate([3] * 58 + [2] * 2):                        # VS: 178 groups, 57 + 51 + 25 figures
        for q in range(n):
            add("VS", s, 0, q, "0")
            if s not in (56, 57, 59): add("VS", s, 1, q, "1")
            if s < 51: add("VS", s, 2, q, "2")
            if s < 6 or (s < 25 and q == 0): add("VS", s, 3, q, "2")
    return out


HALLUSION = hallusion()


def judged(verdict):
    said = {0: "incorrect", 1: "correct", 2: "unclear", None: None}
    return [{k: i[k] for k in KEY} | dict(reply=said[verdict(n, i)], judge="judge-1", run=0) for n, i in enumerate(HALLUSION)]


def in_groups(right, *fields, keep=lambda i: True):
    groups = defaultdict(list)
    for i, r in zip(HALLUSION, right):
        if keep(i): groups[tuple(i[f] for f in ("category", "subcategory", "set_id", *fields))].append(r)
    return [all(g) for g in groups.values()], sum(map(len, groups.values()))


def sums(rows_of=lambda i: 1):
    b, by_unit = BENCHMARKS["hallusionbench"], defaultdict(list)
    from realign_nb.bench import Row
    for i in HALLUSION: by_unit[b.unit(i)].append(Row(i, "", rows_of(i)))
    return np.sum([count_hallusion(r, "official")["all"] for r in by_unit.values()], 0)


def test_the_official_group_counts():
    counts = dict(zip(("q", "f", "Easy", "Hard", "a"), sums()[1:10:2].astype(int).tolist()))
    assert counts == dict(q=455, f=346, Easy=455, Hard=430, a=1129)
    of = lambda **kw: sum(all(i[k] == v for k, v in kw.items()) for i in HALLUSION)
    assert (of(category="VD"), of(category="VS"), of(visual_input="0"), of(visual_input="1"), of(visual_input="2")) == (591, 538, 178, 447, 504)
    assert in_groups([1] * 1129, "question_id", keep=lambda i: i["visual_input"] != "2")[1] == 625
    assert len({tuple(i[k] for k in KEY) for i in HALLUSION}) == 1129 and len(image_only(HALLUSION)) == 951


def test_hallusion_accuracies_against_a_plain_count():
    rng = random.Random(3)
    verdicts = [rng.choices([0, 1, 2], [2, 7, 1])[0] for _ in HALLUSION]
    right = [v == 1 or (v == 2 and i["category"] == "VS" and i["figure_id"] == "0") for v, i in zip(verdicts, HALLUSION)]
    s = score("hallusionbench", HALLUSION, judged(lambda n, i: verdicts[n]))
    mean = lambda groups: 100 * sum(groups[0]) / len(groups[0])
    assert s["metrics"]["q"] == pytest.approx(mean(in_groups(right, "question_id")))
    assert s["metrics"]["f"] == pytest.approx(mean(in_groups(right, "figure_id", keep=lambda i: (i["category"], i["figure_id"]) != ("VS", "0"))))
    assert s["metrics"]["Easy"] == pytest.approx(mean(in_groups(right, "question_id", keep=lambda i: i["visual_input"] != "2")))
    assert s["metrics"]["Hard"] == pytest.approx(mean(in_groups(right, "question_id", keep=lambda i: i["visual_input"] == "2")))
    assert s["metrics"]["a"] == pytest.approx(100 * sum(right) / 1129) and s["scale"] == "percent" and s["units"] == 160
    yes = [int(int(r) == int(i["gt_answer"])) for r, i in zip(right, HALLUSION)]
    assert s["metrics"]["yes/difference"] == pytest.approx(100 * (sum(yes) - sum(int(i["gt_answer"]) for i in HALLUSION)) / 1129)
    wrong = [i["gt_answer"] for r, i in zip(right, HALLUSION) if not r]
    assert s["metrics"]["yes/of_errors"] == pytest.approx(100 * wrong.count("0") / len(wrong))
    assert s["metrics"]["f"] + s["metrics"]["figures/inconsistent"] + s["metrics"]["figures/wrong"] == pytest.approx(100)
    figures = defaultdict(list)
    for i, r in zip(HALLUSION, right):
        if (i["category"], i["figure_id"]) != ("VS", "0"): figures[tuple(i[k] for k in KEY[:4])].append(r)
    assert s["metrics"]["figures/wrong"] == pytest.approx(100 * sum(not any(f) for f in figures.values()) / 346)
    shuffled = random.Random(4)
    assert score("hallusionbench", shuffled.sample(HALLUSION, 1129), shuffled.sample(judged(lambda n, i: verdicts[n]), 1129)) == s


def test_hallusion_extremes_and_unclear_verdicts():
    m = lambda verdict: {k: score("hallusionbench", HALLUSION, judged(lambda n, i: verdict))["metrics"][k] for k in ("q", "f", "Easy", "Hard", "a")}
    assert set(m(1).values()) == {100} and set(m(0).values()) == {0}
    unclear = m(2)                                                    # right only for the 178 records of VS without an image
    assert unclear["a"] == pytest.approx(17800 / 1129) and unclear["f"] == unclear["Hard"] == 0 and 0 < unclear["Easy"] < 100
    assert m(1)["q"] == 100 and score("hallusionbench", HALLUSION, judged(lambda n, i: 0 if n == 0 else 1))["metrics"]["q"] == pytest.approx(45400 / 455)


def test_ids_may_be_numbers():
    asked = [i | {k: int(i[k]) for k in ("set_id", "figure_id", "question_id", "visual_input", "gt_answer")} for i in HALLUSION]
    unclear = judged(lambda n, i: 2)
    assert score("hallusionbench", asked, unclear)["metrics"] == score("hallusionbench", HALLUSION, unclear)["metrics"]


def test_a_record_without_a_verdict_is_left_out_and_counted():
    hole = [n for n, i in enumerate(HALLUSION) if i["visual_input"] == "1"][:7]
    s = score("hallusionbench", HALLUSION, judged(lambda n, i: None if n in hole else 1))
    assert {s["metrics"][k] for k in ("q", "f", "Easy", "Hard", "a")} == {100} and s["unjudged"] == 7
    wrong = score("hallusionbench", HALLUSION, judged(lambda n, i: None if n in hole else 0 if n == 1128 else 1))
    assert wrong["metrics"]["a"] == pytest.approx(100 * 1121 / 1122)


def test_hallusion_without_a_judge():
    said = [{k: i[k] for k in KEY} | dict(model_prediction="Yes, indeed." if i["gt_answer"] == "1" else "No.") for i in HALLUSION]
    s = score("hallusionbench", HALLUSION, said, "yes_no")
    assert {s["metrics"][k] for k in ("q", "f", "Easy", "Hard", "a")} == {100} and s["rule"] == "yes_no"
    vague = score("hallusionbench", HALLUSION, [p | dict(model_prediction="I cannot tell") for p in said], "yes_no")
    assert vague["metrics"]["a"] == 0 and vague["unparsable"] == 1129                             # wrong also at figure 0, and never left out
    with pytest.raises(ValueError, match="a text 'reply'"): score("hallusionbench", HALLUSION, said)          # answers are no verdicts
    replies = [{k: i[k] for k in KEY} | dict(reply="correct") for i in HALLUSION]
    with pytest.raises(ValueError, match="'text' or 'model_prediction'"): score("hallusionbench", HALLUSION, replies, "yes_no")
    less = compare("hallusionbench", HALLUSION, said, said[1:], "yes_no")
    assert less["left_out"] == 0 and less["faults"]["b"]["missing"] == 1 and less["difference"]["a"] == pytest.approx(100/1129)
    part = score("hallusionbench", image_only(HALLUSION), said, "yes_no")
    assert part["n"] == 951 and part["metrics"]["a"] == 100


@pytest.mark.parametrize("category, visual, before, now, same, kind", [
    ("VD", "2", 1, 1, True, "right"), ("VD", "2", 0, 1, True, "VI"), ("VD", "2", 2, 1, True, "VI"), ("VD", "2", 1, 0, True, "Mixed"),
    ("VD", "2", 1, 0, False, "VI"), ("VD", "2", 1, 2, True, "VI"), ("VD", "2", 0, 0, True, "VI"), ("VD", "2", 2, 0, True, "VI"),
    ("VS", "1", 0, 1, False, "LH"), ("VS", "1", 0, 0, True, "LH"), ("VS", "1", 0, 0, False, "Mixed"), ("VS", "2", 0, 2, True, "Mixed"),
    ("VS", "1", 2, 1, False, "right"), ("VS", "2", 2, 0, True, "VI"), ("VS", "1", 2, 2, True, "VI"), ("VS", "1", 1, 2, True, "VI"),
    ("VS", "1", 1, 0, True, "VI"), ("VS", "2", 1, 0, True, "LH"), ("VS", "2", 1, 0, False, "VI"), ("VS", "2", 1, 1, True, "right"),
    ("VS", "2", None, 1, True, "unknown"), ("VS", "2", 1, None, True, "unknown")])
def test_language_or_vision(category, visual, before, now, same, kind):
    items = [dict(category=category, subcategory="map", visual_input=v, set_id="0", figure_id=f, question_id="0") for f, v in (("0", "0"), ("1", visual))]
    verdicts = {f"{category}|map|0|0|0": before, f"{category}|map|0|1|0": now}
    assert {k: v for k, v in failure_kinds(items, verdicts, {f"{category}|map|0|1|0": same}).items() if v} == {kind: 1}


def test_every_wrong_group_has_one_kind_of_failure():
    rng, name = random.Random(5), lambda i: "|".join(i[k] for k in KEY)
    verdicts = {name(i): rng.choice([0, 1, 1, 2]) for i in HALLUSION}
    same = {name(i): rng.random() < .5 for i in HALLUSION}
    right = [verdicts[name(i)] == 1 or (verdicts[name(i)] == 2 and i["category"] == "VS" and i["figure_id"] == "0") for i in HALLUSION]
    kinds, groups = failure_kinds(HALLUSION, verdicts, same), in_groups(right, "question_id")[0]
    assert kinds["LH"] + kinds["VI"] + kinds["Mixed"] == groups.count(False) and kinds["right"] == groups.count(True) and min(kinds.values()) == kinds["unknown"] == 0
    verdicts[name(HALLUSION[0])] = None
    assert failure_kinds(HALLUSION, verdicts, same)["unknown"] == 1


# ---- all three

@pytest.mark.parametrize("metrics, groups, width", [(pope_metrics, SPLITS, 6), (mme_metrics, SUBTASKS, 4), (hallusion_metrics, ["all"], 14)])
def test_metrics_are_vectorised(metrics, groups, width):
    sums = np.random.default_rng(0).integers(0, 50, (5, len(groups), width)).astype(float)
    many = metrics(groups, sums)
    for n in range(5):
        for k, v in metrics(groups, sums[n]).items(): assert many[k][n] == pytest.approx(float(v), nan_ok=True)
    nothing = metrics(groups, np.zeros((2, len(groups), width)))            # a resample without a subtask of MME has no sum; a share of nothing is 0
    assert all(np.isnan(v).all() if metrics is mme_metrics and not k.endswith("plus") else np.isfinite(v).all() for k, v in nothing.items())


@pytest.mark.parametrize("benchmark, item, text", [
    ("pope", dict(question_id="q7", image="a", label="Y"), "q7.*labels are yes and no"), ("pope", dict(question_id="q7", image="a"), "label None"),
    ("mme", dict(question_id="q7", category="colour", image="a", answer="Yes"), "q7.*category 'colour'.*14 subtasks"),
    ("mme", dict(question_id="q7", category="color", image="a", answer="1"), "answer '1'"),
    ("hallusionbench", HALLUSION[0] | dict(visual_input="3"), "VD|chart|0|0|0.*visual_input '3'"),
    ("hallusionbench", HALLUSION[0] | dict(gt_answer="yes"), "gt_answer 'yes'"), ("hallusionbench", HALLUSION[0] | dict(category="vd"), "category 'vd'")])
def test_wrong_items_are_named(benchmark, item, text):
    with pytest.raises(ValueError, match=text): BENCHMARKS[benchmark].check(item)


def test_published_pope_answers_give_the_published_score():
    splits = known("pope_llava15_13b.json")["splits"]
    items, said = [], []
    for s, d in splits.items():
        for n, (label, a) in enumerate(zip(d["labels"], d["predictions"])):
            items.append(dict(question_id=f"{s}/{n}", label=dict(y="yes", n="no")[label], category=s))
            said.append(dict(question_id=f"{s}/{n}", text=dict(y="yes", n="no", Y="Yes", N="No")[a]))
    for rule in ("llava", "lmms_eval", "vlmevalkit"):
        m = score("pope", items, said, rule)["metrics"]
        assert [round(m[f"{s}/accuracy"], 5) for s in SPLITS] == [.88007, .87433, .85500] and round(m["mean/f1"], 4) == .8595
    assert rule_disagreement(items, said)["share"] == 0


def test_published_mme_answers_give_the_published_score():
    rows = known("mme_llava15_13b.json")["rows"]
    seen = defaultdict(int)
    items, said = [], []
    for category, image, answer, text in rows:
        k = f"{category}/{image}"
        items.append(dict(question_id=f"{k}/{seen[k]}", category=category, image=image, answer=answer))
        said.append(dict(question_id=f"{k}/{seen[k]}", text=text)); seen[k] += 1
    for rule in ("llava", "lmms_eval"):
        s = score("mme", items, random.Random(0).sample(said, len(said)), rule)
        assert (round(s["metrics"]["perception"], 2), round(s["metrics"]["cognition"], 2), s["n"], s["units"]) == (1531.32, 295.36, 2374, 1187)
