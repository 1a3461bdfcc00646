"""TextVQA and VizWiz: the normaliser's peculiarities one by one, soft accuracy, the upload file, and a published upload reproduced."""
import itertools
import json
import random
import time
from fractions import Fraction

import pytest

from published import known_file
from realign_nb.bench import parse, records, score
from realign_nb.answers import MARKS
from realign_nb.vqa import (CONTRACTIONS, FORMS, NUMBERS, SOFT, answers_of, as_compared, normalise, question_in, soft_accuracy,
                            textvqa_predictions, upload_rows, write_upload)

RULES = ["llava", "vqa", "vlmevalkit"]


def known(name): return json.loads(known_file(name).read_text(encoding="utf-8"))["rows"]


# ---- the normaliser

@pytest.mark.parametrize("text, llava, vqa, vlmevalkit", [
    ("Yes", "yes", "yes", "yes"), ("YES.", "yes", "yes", "yes"), (" a\tb\nc ", "b c", "b c", "b c"), ("", "", "", ""), ("?!", "", "", ""),
    # articles, also as the whole answer; number words
    ("The dog", "dog", "dog", "dog"), ("A", "", "", ""), ("an", "", "", ""), ("vitamin A", "vitamin", "vitamin", "vitamin"),
    ("none", "0", "0", "0"), ("Zero", "0", "0", "0"), ("Ten", "10", "10", "10"), ("eleven", "eleven", "eleven", "eleven"), ("twenty one", "twenty 1", "twenty 1", "twenty 1"),
    # marks: replaced, or deleted where they stand beside a blank anywhere
    ("stop/go", "stop go", "stop go", "stop go"), ("stop / go", "stop go", "stop go", "stop go"), ("a1/b / c", "a1b c", "a1b c", "a1b c"),
    ("e-mail", "e mail", "e mail", "e mail"), ("e-mail - b", "email b", "email b", "email b"), ("e-mail /b", "e mail b", "e mail b", "e mail b"),
    ("(555) 123-4567", "555 123 4567", "555 123 4567", "555 123 4567"), ("yes!no", "yes no", "yes no", "yes no"), ('"quoted"', "quoted", "quoted", "quoted"),
    ("x:y", "x:y", "x:y", "x:y"), ("10:30", "10:30", "10:30", "10:30"), ("50%", "50%", "50%", "50%"), ("$5", "$5", "$5", "$5"), ("#1 & *2*", "#1 & *2*", "#1 & *2*", "#1 & *2*"),
    # a comma between digits deletes every mark, but LLaVA's commas are gone before
    ("1,000", "1000", "1000", "1000"), ("1,000-2,000", "1000 2000", "10002000", "10002000"), ("1,000/b", "1000 b", "1000b", "1000b"), ("x,y", "xy", "x y", "x y"),
    ("x, y", "x y", "x y", "x y"), ("why?not", "whynot", "why not", "why not"), ("1, 2", "1 2", "1 2", "1 2"), ("1,b", "1b", "1 b", "1 b"),
    # full stops: only what follows counts; mended in VLMEvalKit
    ("3.5", "3.5", "3.5", "3.5"), (".5", ".5", ".5", ".5"), ("5.", "5", "5", "5."), ("no.5", "no.5", "no.5", "no.5"), ("no. 5", "no 5", "no 5", "no 5"), ("7 a.m.", "7 am", "7 am", "7 am"),
    ("7.a", "7a", "7a", "7.a"), ("U.S.A.", "usa", "usa", "usa"), ("1...", "1", "1", "1."), ("a.b.c", "abc", "abc", "abc"),
    # apostrophes
    ("dont", "don't", "don't", "don't"), ("don't", "don't", "don't", "don't"), ("thats", "that's", "that's", "that's"), ("that's", "that 's", "that's", "that's"),
    ("McDonald's", "mcdonald 's", "mcdonald's", "mcdonald's"), ("couldntve", "couldntve", "couldntve", "couldntve"), ("couldnt've", "couldn't've", "couldn't've", "couldn't've"),
    ("somebody'd", "somebodyd", "somebodyd", "somebodyd"), ("somebodyd", "somebodyd", "somebodyd", "somebodyd"), ("Im", "im", "im", "im"), ("its", "its", "its", "its"),
    ("o'clock", "o'clock", "o'clock", "o'clock"), ("5 oclock", "5 o'clock", "5 o'clock", "5 o'clock"), ("let's", "let 's", "let's", "let's")])
def test_normalised(text, llava, vqa, vlmevalkit):
    assert [normalise(text, r) for r in RULES] == [llava, vqa, vlmevalkit]
    assert [parse("textvqa", text, r) for r in RULES] == [llava, vqa, vlmevalkit]


@pytest.mark.parametrize("rule", RULES)
def test_at_most_thirty_two_full_stops_go(rule):
    assert [normalise("x." * n, rule).count(".") for n in (31, 32, 33, 40)] == [0, 0, 1, 8]


@pytest.mark.parametrize("mark", list(MARKS))
def test_every_mark(mark):
    in_between = {"llava": "xy" if mark in ",?" else "x y"}
    for r in RULES:
        assert normalise(f"x{mark}y", r) == in_between.get(r, "x y")
        assert normalise(f"x{mark} y", r) == "x y"
        assert normalise(f"x{mark}y {mark}z", r) == "xy z"
        if r != "llava": assert normalise(f"x{mark}y 1,000", r) == "xy 1000"


def test_the_tables():
    assert len(MARKS) == len(set(MARKS)) == 21 and len(NUMBERS) == 12 and len(CONTRACTIONS) == 114
    assert all(k.replace("'", "") == v.replace("'", "") and len(v) - len(k) == (-1 if k == "somebody'd" else 1) for k, v in CONTRACTIONS.items())
    assert not set(FORMS) & set(CONTRACTIONS) and {"its", "well", "were", "ill", "id", "shell", "hell", "wed", "cant've"}.isdisjoint(CONTRACTIONS)


def test_twice_is_once_but_for_the_known_exceptions():
    for text in ("The Coca-Cola", "dont", "don't", "10:30 p.m.", "three - four", "a/b c"):
        assert all(normalise(normalise(text, r), r) == normalise(text, r) for r in RULES)
    assert normalise(normalise("x." * 40)) != normalise("x." * 40)
    assert [normalise(normalise("thats", r), r) for r in RULES] == ["that 's", "that's", "that's"]     # an upload is normalised once


# ---- soft accuracy

def brute(answers, said):
    "The definition, in fractions: leave each person out in turn."
    return float(sum(min(Fraction(1), Fraction(sum(a == said for j, a in enumerate(answers) if j != i), 3)) for i in range(10)) / 10)


def test_soft_accuracy_is_the_definition():
    for m in range(11):
        answers = ["soup"] * m + [f"other {i}" for i in range(10 - m)]
        assert SOFT[m] == pytest.approx(brute(answers, "soup")) == soft_accuracy("soup", dict(answers=answers))
    assert [float(x) for x in SOFT] == [0, .3, .6, .9] + [1] * 7
    rng = random.Random(0)
    for _ in range(200):
        answers, said = rng.choices("uvwxy", k=10), rng.choice("uvwxyz")
        assert soft_accuracy(said, dict(answers=answers)) == pytest.approx(brute(answers, said))
    assert soft_accuracy(None, dict(answers=["x"] * 10)) == 0


@pytest.mark.parametrize("answers, text, expected", [
    (["yes"] * 10, "yes", [1, 1, 1]), (["yes"] * 10, "Yes", [1, 0, 1]), (["yes"] * 10, "yes.", [1, 0, 1]), (["yes"] * 10, " yes\n", [1, 1, 1]),
    (["Yes"] * 10, "Yes", [1, 1, 1]), (["Yes"] * 10, "yes", [1, 0, 1]), (["yes"] * 9 + ["Yes"], "Yes.", [1, 1, 1]), (["two"] * 10, "2", [1, 0, 1]),
    ([" yes"] * 5 + ["yes "] * 5, "Yes", [1, 0, 1]), (["5"] * 10, "5.", [1, 0, 0]), (["5"] * 9 + ["five"], "5.", [1, 1, 0]),
    (["that's it"] * 4 + ["x"] * 6, "thats it", [0, 1, 1]), (["a"] * 4 + ["b"] * 6, "The", [1, 1, 1])])
def test_what_a_rule_is_worth(answers, text, expected):
    for kind in (answers, [dict(answer=a, answer_confidence="yes") for a in answers]):
        item = dict(question_id=1, image_id="i", answers=kind)
        assert [score("textvqa", [item], [dict(question_id=1, text=text)], r)["metrics"]["accuracy"] for r in RULES] == [100 * x for x in expected]


def test_parse_of_the_original_rule_depends_on_the_people():
    assert [as_compared("Yes.", dict(answers=a), "vqa") for a in (["yes"] * 10, ["yes"] * 9 + ["no"])] == ["Yes.", "yes"]
    assert as_compared("Yes.", None, "vqa") == "yes"


# ---- scores

def vizwiz(n, seed=0):
    rng, types = random.Random(seed), ["yes/no", "number", "other", "unanswerable"]
    return [dict(image=f"VizWiz_val_{i:08}.jpg", question="What?", answer_type=types[i % 4], answers=[dict(answer=a, answer_confidence="maybe") for a in
                 ["soup", "can"][i % 2:][:1] * 7 + rng.choices(["tin", "two", "unanswerable"], k=3)]) for i in range(n)]


VAL = vizwiz(40)


def best(items): return [dict(image=i["image"], text=answers_of(i)[0].upper() + ".") for i in items]


def test_vizwiz_maximum_types_and_one_flip():
    s = score("vizwiz", VAL, best(VAL))
    assert set(s["metrics"].values()) == {100.0} and (s["n"], s["units"], s["scale"], s["right"]) == (40, 40, "percent", None)
    assert list(s["metrics"]) == ["accuracy", "accuracy_answered"] + [f"{t}/accuracy" for t in ("number", "other", "unanswerable", "yes/no")]
    p = best(VAL)
    p[5]["text"] = "nothing"
    m = score("vizwiz", VAL, p)["metrics"]
    assert m["accuracy"] == pytest.approx(97.5) and m["number/accuracy"] == 90 and m["yes/no/accuracy"] == m["other/accuracy"] == 100


def test_missing_answers_score_nothing_and_leave_the_second_denominator():
    p = best(VAL)[1:] + [dict(image="nobody.jpg", text="x"), best(VAL)[3]]
    p[0] = p[0] | dict(text=" ")
    s = score("vizwiz", VAL, p)
    assert [s[k] for k in ("missing", "unmatched", "duplicate", "unparsable")] == [1, 1, 1, 1]
    assert s["metrics"]["accuracy"] == pytest.approx(95) and s["metrics"]["accuracy_answered"] == pytest.approx(100 * 38 / 39)


def test_unanswerable_is_a_string():
    item = dict(image="x.jpg", answers=["unanswerable"] * 3 + ["soup"] * 7, answer_type="other")
    assert [score("vizwiz", [item], [dict(image="x.jpg", text=t)])["metrics"]["accuracy"] for t in ("Unanswerable", "unanswerable.", "not answerable")] == pytest.approx([90, 90, 0])


def test_order_shards_and_records():
    p, rng = best(VAL), random.Random(3)
    for n in (1, 8, 9): p[n]["text"] = "tin"
    whole = score("vizwiz", VAL, p)
    assert score("vizwiz", rng.sample(VAL, 40), rng.sample(p, 40)) == whole == score("vizwiz", VAL, p[25:] + p[:25])
    parts = [score("vizwiz", VAL[:10], p[:10]), score("vizwiz", VAL[10:], p[10:])]
    assert sum(x["metrics"]["accuracy"] * x["n"] for x in parts) / 40 == pytest.approx(whole["metrics"]["accuracy"])
    r = {x["id"]: x for x in records("vizwiz", VAL, p)}[VAL[1]["image"]]
    assert r["parse"] == dict.fromkeys(RULES, "tin") and r["right"] is None


def test_textvqa_units_are_images():
    items = [dict(question_id=i, image_id=f"im{i // 3}", question=f"q{i}", answers=["x"] * 10) for i in range(9)]
    s = score("textvqa", items, [dict(question_id=i, text="X") for i in range(9)])
    assert (s["units"], s["n"], s["metrics"]["accuracy"]) == (3, 9, 100)
    by_question = [dict(image_id=i["image_id"], question=i["question"], text="X") for i in items]
    assert score("textvqa", items, by_question)["metrics"]["accuracy"] == 100


def test_llava_answer_files_join_by_question():
    ask = "\nAnswer the question using a single word or phrase."
    items = [dict(question_id=n, image_id=im, question=q, answers=[f"w{n}"] * 10) for n, (im, q) in enumerate(itertools.product(["im0", "im1"], ["What Year?", "who?"]))]
    prompts = [f"{q}\nReference OCR token: A, b{ask}" if n % 2 else f"{q}{ask}" for n, q in enumerate(["what year?", "Who?"] * 2)]
    files = [dict(question_id=i["image_id"], prompt=p, text=f"W{i['question_id']}") for i, p in zip(items, prompts)]
    files[0]["prompt"] = f"Reference OCR token: what, year\nWhat year?{ask}"
    assert {question_in(f["prompt"]) for f in files} == {"what year?", "who?"}
    assert textvqa_predictions(files[::-1], items) == [dict(question_id=n, text=f"W{n}") for n in (3, 2, 1, 0)]
    assert score("textvqa", items, textvqa_predictions(files, items))["metrics"]["accuracy"] == 100
    with pytest.raises(ValueError, match="no prediction fits an item"): score("textvqa", items, files)             # image ids are no question ids
    s = score("textvqa", items, textvqa_predictions(files[:3] + [files[3] | dict(question_id="im9")], items))
    assert (s["missing"], s["unmatched"]) == (1, 1)
    with pytest.raises(ValueError, match="record 1 has no prompt"): textvqa_predictions([dict(question_id="im0", text="x")], items)
    with pytest.raises(ValueError, match="repeat a question"): textvqa_predictions(files, items + items[:1])


@pytest.mark.parametrize("answers, text", [(None, "write_upload"), ([], "write_upload"), (["x"] * 9, "needs ten"), (["x"] * 11, "needs ten"), ([None] * 10, "needs ten"), ([dict(answer=5)] * 10, "needs ten")])
def test_a_test_split_is_never_scored(answers, text):
    for benchmark in ("vizwiz", "textvqa"):
        with pytest.raises(ValueError, match=text): score(benchmark, [dict(question_id=1, image="VizWiz_test_0.jpg", answers=answers)], [dict(question_id=1, text="x")])
    with pytest.raises(ValueError, match="write_upload"): score("vizwiz", VAL + [dict(image="VizWiz_test_0.jpg", question="?")], best(VAL))


# ---- the upload

TEST = [dict(question_id=n, image=f"VizWiz_test_{n}.jpg") for n in range(3)]


def test_upload_rows(tmp_path):
    p = [dict(question_id=n, text=t) for n, t in ((2, "Coca-Cola."), (0, "It's TWO"), (1, "Unanswerable"), (2, "again"))]
    rows = [dict(image="VizWiz_test_0.jpg", answer="it 's 2"), dict(image="VizWiz_test_1.jpg", answer="unanswerable"), dict(image="VizWiz_test_2.jpg", answer="coca cola")]
    assert upload_rows(p, TEST) == rows == json.loads(write_upload(p, tmp_path / "up.json", TEST).read_text())
    by_image = [dict(image=r["image"], text=t) for r, t in zip(rows, ("It's TWO", "Unanswerable", "Coca-Cola."))]
    assert upload_rows(by_image) == upload_rows(by_image, TEST) == upload_rows(by_image[::-1], TEST) == rows
    assert upload_rows(by_image, TEST, "vqa")[0]["answer"] == "it's 2"
    for bad, items, text in ((p[1:2], TEST, "2 of 3 images have no prediction, the first is 1"), (by_image[:2] * 2, None, "2 images come twice"), (p, None, "needs 'image'"),
                             ([dict(image="x.jpg", text=None)], None, "and a text"), (by_image[:1], TEST, "VizWiz_test_1.jpg")):
        with pytest.raises(ValueError, match=text): upload_rows(bad, items)


def test_a_published_upload_is_reproduced():
    rows = known("vizwiz_llava15_13b_normalised.json")
    assert len(rows) == 2060 and [t for t, a in rows if normalise(t) != a] == []
    assert upload_rows([dict(image=f"{n}.jpg", text=t) for n, (t, _) in enumerate(rows)]) == [dict(image=f"{n}.jpg", answer=a) for n, (_, a) in enumerate(rows)]


def test_unknown_rules_and_speed():
    with pytest.raises(ValueError, match="unknown rule 'x'"): normalise("a", "x")
    with pytest.raises(ValueError, match="no rule"): score("vizwiz", VAL, best(VAL), "x")
    start = time.perf_counter()
    for n in range(20000): normalise(f"The {n} Coca-Colas, or {n}.", "vqa")
    assert time.perf_counter() - start < 5                    # 0.1 s on an idle core
