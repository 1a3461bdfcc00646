"""ScienceQA and MMBench: parses record by record, both accuracies, rotations, a judge's letters, and published scores from published answers."""
import json
import random

import pytest

from published import known_file
from realign_nb.bench import compare, parse, records, score
from realign_nb.choice import NOTE, REFUSALS, STEP, add_letters, answer_letter, infer_option, options, rotations, subsets, why_not_circular



def known(name): return json.loads(known_file(name).read_text(encoding="utf-8"))["rows"]


# ---- ScienceQA

COLOURS = dict(question_id="1", choices=["red", "blue", "a dog"], answer=1)


@pytest.mark.parametrize("text, llava, lenient", [
    ("B", "B", "B"), ("E", "E", "E"), ("F", None, None), ("b", None, "B"), (" B", None, "B"), ("B ", None, "B"), ("B\n", None, "B"),
    ("B.", None, "B"), ("B. ", "B", "B"), ("B. blue", "B", "B"), ("F. blue", None, None), ("B.blue", None, None), ("B: blue", None, "B"),
    ("(B)", None, "B"), ("(B) blue", None, "B"), ("B) blue", None, "B"), ("**B**", None, "B"), ("**B.** blue", None, "B"), ("B\nblue", None, "B"),
    ("The answer is B", None, "B"), ("The answer is B.", "B", "B"), ("The answer is B\n", None, "B"), ("So. The answer is B. Yes.", "B", "B"),
    ("The answer is Blue", "B", "B"), ("The answer is Z.", "Z", "Z"), ("the answer is B.", None, "B"), ("The answer is b.", None, None),
    ("The answer is A. The answer is B.", None, None), ("The answer is B. The answer is B.", None, "B"), ("The answer is (B).", None, "B"),
    ("Answer: B", None, "B"), ("the correct option is **B**", None, "B"), ("option A or option B", None, None), ("choice B because", None, "B"),
    ("blue", None, "B"), (" Blue. ", None, "B"), ("a blue one", None, None), ("a dog", None, "C"), ("A dog", None, "C"), ("A. dog", "A", "A"),
    ("A.D. 500", None, None), ("", None, None), ("Because", None, None)])
def test_scienceqa_parses(text, llava, lenient):
    assert [parse("scienceqa", text, r, COLOURS) for r in ("llava", "lenient")] == [llava, lenient]


def test_a_letter_beyond_the_choices_is_wrong():
    item = dict(question_id="1", choices=["x", "y"], answer=0)
    for text in ("C", "E", "The answer is Z."):
        s = score("scienceqa", [item], [dict(question_id="1", text=text)])
        assert (s["metrics"]["accuracy"], s["unparsable"]) == (0, 0)


@pytest.mark.parametrize("answer, letter", [(0, "A"), (2, "C"), ("A", "A"), ("C", "C")])
def test_a_key_is_a_place_or_a_letter(answer, letter):
    assert answer_letter(COLOURS | dict(answer=answer)) == letter


@pytest.mark.parametrize("answer", [3, -1, "D", "b", None, True, "AB", 1.0, ""])
def test_a_key_outside_the_choices_is_an_error(answer):
    with pytest.raises(ValueError, match="item '1': answer"): score("scienceqa", [COLOURS | dict(answer=answer)], [])


def sqa(n, seed=0):
    rng = random.Random(seed)
    return [dict(question_id=str(i), choices=list("wxyz")[:rng.randint(2, 4)], answer=rng.randint(0, 1), image=rng.choice([None, f"{i}.png"]), hint=rng.choice(["", "Look."]),
                 subject=rng.choice(["natural science", "social science", "language science"]), grade=f"grade{rng.randint(1, 12)}") for i in range(n)]


SQA = sqa(80)


def said(items, flip=()):
    return [dict(question_id=i["question_id"], text="AB"[i["answer"] ^ (i["question_id"] in flip)]) for i in items]


def test_right_answers_give_the_maximum_and_one_flip_one_count():
    m = score("scienceqa", SQA, said(SQA))["metrics"]
    assert set(m.values()) == {100.0} and list(m)[:3] == ["accuracy", "image_accuracy", "image_accuracy_answered"]
    assert list(m)[3:] == [f"{g}/accuracy" for g in ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")]
    for i in SQA[:6]:
        s = score("scienceqa", SQA, said(SQA, {i["question_id"]}))
        assert s["metrics"]["accuracy"] == pytest.approx(100 * 79 / 80) and s["right"]["n"] == 79
        hurt = {g for g in subsets(i) if g != "all"}
        assert {k[:-9] for k, v in s["metrics"].items() if k[0].isupper() and v < 100} == hurt
        assert (s["metrics"]["image_accuracy"] < 100) == ("IMG" in hurt) == bool(i["image"])


def test_a_missing_image_answer_leaves_only_the_official_image_denominator():
    images = [i["question_id"] for i in SQA if i["image"]]
    p = [q for q in said(SQA) if q["question_id"] != images[0]]
    m = score("scienceqa", SQA, p)["metrics"]
    assert (m["accuracy"], m["image_accuracy"], m["image_accuracy_answered"]) == pytest.approx((100 * 79 / 80, 100 * (1 - 1 / len(images)), 100))
    m = score("scienceqa", SQA, [q for q in said(SQA) if q["question_id"] != next(i["question_id"] for i in SQA if not i["image"])])["metrics"]
    assert (m["accuracy"], m["image_accuracy"], m["image_accuracy_answered"]) == pytest.approx((100 * 79 / 80, 100, 100))


def test_items_without_fields_have_fewer_metrics_and_no_image_accuracy():
    m = score("scienceqa", [dict(question_id=1, answer="B")], [dict(question_id=1, text="B")])["metrics"]
    assert m == dict(accuracy=100, image_accuracy=None, image_accuracy_answered=None)


def test_scienceqa_order_shards_and_rules():
    p, rng = said(SQA, {"3", "7", "30"}), random.Random(1)
    p[5]["text"], p[9]["text"] = f"({p[5]['text']})", "no idea"
    whole = score("scienceqa", SQA, p)
    assert score("scienceqa", rng.sample(SQA, 80), rng.sample(p, 80)) == whole == score("scienceqa", SQA, p[50:] + p[:50])
    counts = [score("scienceqa", i, q)["right"]["n"] for i, q in ((SQA[:30], p[:30]), (SQA[30:], p[30:]))]
    assert sum(counts) == whole["right"]["n"] == 75 and whole["unparsable"] == 2
    assert score("scienceqa", SQA, p, "lenient")["right"]["n"] == 76
    by_id = {r["id"]: r for r in records("scienceqa", SQA, p)}
    assert by_id["5"]["parse"] == dict(llava=None, lenient="AB"[SQA[5]["answer"]]) and by_id["9"]["parse"] == dict(llava=None, lenient=None)
    assert compare("scienceqa", SQA, said(SQA), p)["mcnemar"]["all"]["a_only"] == 5


def test_two_choices_with_one_text_are_not_guessed():
    assert parse("scienceqa", "blue", "lenient", dict(choices=["Blue.", "blue", "red"])) is None


def test_subsets_at_their_borders():
    item = dict(question_id="1", answer=0)
    assert [subsets(item | dict(grade=g))[1:] for g in ("grade1", "grade6", "grade7", "grade12", "", None)] == [["G1-6"], ["G1-6"], ["G7-12"], ["G7-12"], [], []]
    assert [subsets(item | x)[1:] for x in (dict(hint=""), dict(hint="x"), dict(hint="", image="x"), dict(hint="x", image="x"), dict(image=None), dict(image=""))] == \
        [["NO"], ["TXT"], ["IMG"], ["TXT", "IMG"], [], []]


def test_an_item_may_be_named_id():
    assert score("scienceqa", [dict(id="5", answer=0)], [dict(id="5", text="A")])["metrics"]["accuracy"] == 100


def test_scienceqa_published_answers():
    rows = known("scienceqa_llava15_13b.json")
    items = [dict(question_id=q, answer=a, image="there" if im else None) for q, a, im, _ in rows]
    predictions = [dict(question_id=q, text=t) for q, _, _, t in rows]
    s = score("scienceqa", items, predictions)
    assert (s["right"]["n"], s["n"], round(s["metrics"]["accuracy"], 4)) == (3155, 4241, 74.3928)
    assert round(s["metrics"]["image_accuracy"], 4) == round(s["metrics"]["image_accuracy_answered"], 4) == 71.6411 == round(100 * 1445 / 2017, 4)


# ---- MMBench

ANIMALS = dict(index=7, question="?", A="a dog", B="a black cat", C="12", D="2", answer="B")


@pytest.mark.parametrize("text, exact, strict", [
    ("B", "B", "B"), ("B.", "B", "B"), ("(B)", "B", "B"), ("[B]", "B", "B"), ("{B}", "B", None), ("**B**", "B", "B"), (" B ", "B", "B"), ("b", None, None), ("E", None, None),
    ("B. a black cat", "B", "B"), ("B: a dog", "B", "B"), ("A or B", None, None), ("B B", "B", None),
    ("I say B for good reason", "B", None), ("I say B for quite good reason", None, None), ("B, since there is nothing else", None, None),    # among the last four words, or not
    ("The answer is B", "B", None), ("The answer is B, since there is nothing else here", "B", None), ("answer  is **B** without any doubt at all", "B", None),
    ("The answer is a dog", "A", None), ("The answer is black", "B", None), ("The answer is definitely the second", "D", None), ("The answer is 12", None, None), ("The answer is E", None, None),
    ("a dog", "A", None), ("A dog", "A", None), ("A BLACK CAT", "A", None), ("It is a black cat", "B", None), ("a dog and a black cat", None, None),
    ("2", "D", None), ("12", None, None), ("It shows 12", None, None), ("it is a black cat " + "x" * 20, "B", None), ("it is a black cat " + "x" * 21, None, None),       # longer than twice the options
    ("Z", "Z", None), ("A or Z", "A", None), ("", None, None), ("Failed to obtain answer via API. B", None, None)] + [(f"{r} B", "Z", None) for r in REFUSALS])
def test_mmbench_parses(text, exact, strict):
    assert [parse("mmbench", text, r, ANIMALS) for r in ("exact", "strict")] == [exact, strict]


def test_no_random_fallback():
    texts = ["It is unclear to me", "", "b", "one of them", "12"]
    assert {parse("mmbench", t, "exact", ANIMALS) for t in texts * 50} == {None}
    item = dict(index=1, A="red", B="blue", answer="B")
    s = [score("mmbench", [item], [dict(index=1, prediction=t)]) for t in texts]
    assert {(x["metrics"]["vanilla"], x["unparsable"]) for x in s} == {(0, 1)}


def test_options_leave_out_empty_cells():
    assert options(dict(A="x", B=float("nan"), C=None, D="", E="nan", F=3)) == dict(A="x", F="3")
    assert infer_option("C", options(dict(A="x", B="y"))) is None


def mm(n, seed=0, full=True):
    rng, out = random.Random(seed), []
    for q in range(n):
        letters = "ABCD"[:rng.randint(2, 4)]
        first = {c: f"thing {q} {c}" for c in letters} | dict(index=q + 100, answer=rng.choice(letters), category=rng.choice(["ocr", "colour"]), **{"l2-category": "perception"})
        out += rotations(first) if full else [first]
    return out


MM = mm(20)


def chosen(items, wrong=()):
    return [dict(index=i["index"], prediction="BA"[i["answer"] == "B"] if i["index"] in wrong else i["answer"]) for i in items]


def test_rotations_keep_the_right_text_and_use_every_place_once():
    for q in (m for m in MM if m["index"] < STEP):
        rows = rotations(q)
        assert {r["answer"] for r in rows} == set(options(q)) and rows[0] == q
        assert {r[r["answer"]] for r in rows} == {q[q["answer"]]} and {r["index"] % STEP for r in rows} == {q["index"]}
        assert all(sorted(options(r).values()) == sorted(options(q).values()) for r in rows)


def test_circular_needs_every_rotation_and_vanilla_the_first_row():
    m = score("mmbench", MM, chosen(MM))["metrics"]
    assert (m["circular"], m["vanilla"], m["unreadable"], m["by_judge"]) == (100, 100, 0, 0)
    assert list(m)[4:] == [f"{g}/{k}" for g in ("category/colour", "category/ocr", "l2-category/perception") for k in ("circular", "vanilla")]
    later = score("mmbench", MM, chosen(MM, {MM[1]["index"]}))                              # a rotation of the first question
    assert (later["metrics"]["circular"], later["metrics"]["vanilla"], later["n"], later["units"]) == (95, 100, len(MM), 20)
    first = score("mmbench", MM, chosen(MM, {MM[0]["index"]}))["metrics"]
    assert (first["circular"], first["vanilla"]) == (95, 95)
    both = score("mmbench", MM, chosen(MM, {MM[0]["index"], MM[1]["index"]}))["metrics"]    # one question, however often it is wrong
    assert (both["circular"], both["vanilla"]) == (95, 95)
    lost = score("mmbench", MM, [p for p in chosen(MM) if p["index"] != MM[1]["index"]])
    assert (lost["metrics"]["circular"], lost["metrics"]["unreadable"], lost["missing"], lost["unparsable"]) == (95, 0, 1, 0)


def test_a_constant_letter_passes_no_question():
    m = score("mmbench", MM, [dict(index=i["index"], text="A") for i in MM])["metrics"]
    assert m["circular"] == 0 < m["vanilla"]


def test_mmbench_order_and_shards():
    p, rng = chosen(MM, {MM[4]["index"], MM[9]["index"]}), random.Random(2)
    whole = score("mmbench", MM, p)
    assert score("mmbench", rng.sample(MM, len(MM)), rng.sample(p, len(p))) == whole == score("mmbench", MM, p[11:] + p[:11])
    halves = [score("mmbench", [i for i in MM if i["index"] % 2 == k], [q for q in p if q["index"] % 2 == k]) for k in (0, 1)]
    assert sum(h["metrics"]["circular"] * h["units"] for h in halves) == pytest.approx(20 * whole["metrics"]["circular"])


def test_first_rows_only_give_no_circular_score():
    rows = mm(20, full=False)
    m = score("mmbench", rows, chosen(rows))["metrics"]
    assert m["circular"] is m["category/ocr/circular"] is None and m["vanilla"] == 100
    assert "20 of 20 questions have no rotations" in why_not_circular(rows) and why_not_circular(MM) is None
    mixed = rows[:19] + rotations(rows[19])
    assert score("mmbench", mixed, chosen(mixed))["metrics"]["circular"] is None and "19 of 20" in why_not_circular(mixed)


def test_a_part_of_a_question_is_an_error():
    q = next(m for m in MM if len(options(m)) == 4 and m["index"] < STEP)
    with pytest.raises(ValueError, match="3 of 4 rotations"): score("mmbench", rotations(q)[:3], [])
    with pytest.raises(ValueError, match="not its first row"): score("mmbench", rotations(q)[1:], [])


@pytest.mark.parametrize("change, text", [(dict(index="q1"), "must be a number"), (dict(index=None), "must be a number"), (dict(answer="E"), "none of its options"),
                                          (dict(answer=None), "take dev"), (dict(answer="b"), "none of its options")])
def test_broken_items_are_errors(change, text):
    with pytest.raises(ValueError, match=text): score("mmbench", [ANIMALS | change], [])


def test_refusals_are_unreadable_and_counted():
    p = chosen(MM)
    p[0]["prediction"], p[1]["prediction"] = REFUSALS[3], "who knows"
    s = score("mmbench", MM, p)
    assert s["unparsable"] == 2 and s["metrics"]["unreadable"] == pytest.approx(200 / len(MM)) and s["metrics"]["circular"] == 95


def test_letters_of_a_judge_count_where_nothing_was_read_and_are_reported():
    p = chosen(MM)
    wrong = "BA"[MM[4]["answer"] == "B"]
    for n, text in ((0, "the one on the left"), (1, REFUSALS[0]), (2, "no idea"), (3, "dunno"), (4, wrong)): p[n]["prediction"] = text
    letters = {MM[0]["index"]: MM[0]["answer"], MM[1]["index"]: MM[1]["answer"], MM[2]["index"]: "Z", MM[4]["index"]: MM[4]["answer"]}
    noted = add_letters(p, letters)
    read = {r["id"]: r for r in records("mmbench", MM, noted, "judged")}
    of = lambda n: read[str(MM[n]["index"])]["parse"]["judged"]
    assert [of(n) for n in range(5)] == [MM[0]["answer"], "Z", "Z", None, wrong]          # a refusal stands, and so does a letter that was read
    plain, judged = score("mmbench", MM, noted)["metrics"], score("mmbench", MM, noted, "judged")["metrics"]
    assert plain == score("mmbench", MM, p)["metrics"] and plain["by_judge"] == 0
    assert judged["by_judge"] == pytest.approx(200 / len(MM)) and judged["unreadable"] == pytest.approx(300 / len(MM)) and plain["unreadable"] == pytest.approx(400 / len(MM))
    assert add_letters([dict(index=1, text="x", letter="A")]) == [dict(index=1, text=f"x{NOTE}A")] and add_letters(p) == p
    for bad in ("a", "", "random", "AB", 1):
        with pytest.raises(ValueError, match="index 1"): add_letters([dict(index=1, text="x", letter=bad)])


def test_mmbench_published_answers():
    rows = known("mmbench_dev_20230712_llava15_13b.json")
    items, predictions = [dict(index=i, answer=a) for i, a, _ in rows], [dict(index=i, prediction=p) for i, _, p in rows]
    s = score("mmbench", items, predictions)
    assert (s["n"], s["units"], s["missing"], s["unparsable"]) == (4377, 1176, 0, 0)
    assert (s["metrics"]["circular"], s["metrics"]["vanilla"]) == pytest.approx((100 * 796 / 1176, 100 * 887 / 1176), abs=1e-9)
    assert s["metrics"] == score("mmbench", items, predictions, "strict")["metrics"]       # tidy answers: rules agree
