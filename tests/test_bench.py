"""POPE and CHAIR: counts, joins, intervals and tests, checked on answers whose score is known."""
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from realign_nb.answers import mentions, plural
from realign_nb.bench import compare, compare_seeds, data_sha256, score, score_arms, score_seeds
from realign_nb.chair import chair_items
from realign_nb.stats import LARGE, bootstrap, bootstrap_distinct, holm, mcnemar, swap_distinct, swap_test, wilson
from realign_nb.yes_no import SPLITS, distinct_questions, pope_items, spread_answers

KINDS = ["dog", "frisbee", "teddy bear", "bear", "hot dog", "bus", "mouse", "knife", "traffic light", "cup"]
STATS = [random.Random(f"s{i}").sample(KINDS, 1 + i % 4) for i in range(200)]
TRUTHS = [dict(image_id=i, image=f"/somewhere/{i}.png", objects=random.Random(f"t{i}").sample(KINDS, 1 + i % 4)) for i in range(40)]
POPE, CHAIR = pope_items(TRUTHS, STATS), chair_items(TRUTHS, KINDS)


def truthful(items=POPE):
    return [dict(question_id=i["question_id"], text="Yes." if i["label"] == "yes" else "No.") for i in items]


def noisy(share, seed, items=POPE):
    rng = random.Random(seed)
    return [p | dict(text=rng.choice(["Yes.", "No."])) if rng.random() < share else p for p in truthful(items)]


def described(change=lambda objects: objects):
    return [dict(image_id=t["image_id"], caption="There is " + " and ".join("a " + k for k in change(t["objects"])) + " .") for t in TRUTHS]


def test_right_answers_give_the_maximum():
    m = score("pope", POPE, truthful())["metrics"]
    assert {m[f"{s}/{k}"] for s in SPLITS + ["mean"] for k in ("accuracy", "precision", "recall", "f1")} == {1.0}
    assert {m[f"{s}/yes_ratio"] for s in SPLITS} == {0.5}
    c = score("chair", CHAIR, described())["metrics"]
    assert (c["chair_i"], c["chair_s"], c["recall"]) == (0, 0, 1)


def test_wrong_answers_give_the_minimum():
    wrong = [p | dict(text="No." if p["text"] == "Yes." else "Yes.") for p in truthful()]
    assert score("pope", POPE, wrong)["metrics"]["mean/accuracy"] == 0
    c = score("chair", CHAIR, described(lambda o: [k for k in KINDS if k not in o]))["metrics"]
    assert (c["chair_i"], c["chair_s"], c["recall"]) == (1, 1, 0)


@pytest.mark.parametrize("position", [0, 1, 17, len(POPE) - 1])
def test_one_flipped_answer_moves_the_count_by_one(position):
    p, item = truthful(), POPE[position]
    p[position] = p[position] | dict(text="No." if item["label"] == "yes" else "Yes.")
    m, n = score("pope", POPE, p)["metrics"], sum(i["split"] == item["split"] for i in POPE)
    assert m[f"{item['split']}/accuracy"] == pytest.approx(1 - 1 / n)
    assert m[f"{item['split']}/yes_ratio"] == pytest.approx(.5 + (-1 if item["label"] == "yes" else 1) / n)
    assert {m[f"{s}/accuracy"] for s in SPLITS if s != item["split"]} == {1.0}


def test_order_and_shards_change_nothing():
    p = noisy(.3, 1)
    whole, rng = score("pope", POPE, p), random.Random(2)
    assert score("pope", rng.sample(POPE, len(POPE)), rng.sample(p, len(p))) == whole
    assert score("pope", POPE, p[700:] + p[:700]) == whole
    captions = described(lambda o: o + ["cup"])
    assert score("chair", CHAIR[::-1], captions[::-1]) == score("chair", CHAIR, captions)


def test_parts_add_up_to_the_whole():
    captions = described(lambda o: o + ["cup", "dog"])
    parts = [(CHAIR[:15], captions[:15]), (CHAIR[15:], captions[15:])]
    words = [score("chair", i, p)["metrics"]["length"] * len(i) for i, p in parts]
    assert sum(words) / len(CHAIR) == pytest.approx(score("chair", CHAIR, captions)["metrics"]["length"])


def test_items_of_a_part_are_part_of_the_items():
    part = pope_items(TRUTHS[10:20], STATS)
    by_id = {i["question_id"]: i for i in POPE}
    assert all(by_id[i["question_id"]] == i for i in part)


def test_pope_recipe():
    single = {k: sum(k in s for s in STATS) for k in KINDS}
    for t in TRUTHS:
        of = {s: [i for i in POPE if i["image_id"] == t["image_id"] and i["split"] == s] for s in SPLITS}
        yes = {s: {i["kind"] for i in q if i["label"] == "yes"} for s, q in of.items()}
        no = {s: [i["kind"] for i in q if i["label"] == "no"] for s, q in of.items()}
        n = min(3, len(t["objects"]))
        assert yes["random"] == yes["popular"] == yes["adversarial"] <= set(t["objects"]) and len(yes["random"]) == n
        assert all(len(set(v)) == n and not set(v) & set(t["objects"]) for v in no.values())
        absent = [k for k in KINDS if k not in t["objects"]]
        assert min(single[k] for k in no["popular"]) >= max([single[k] for k in absent if k not in no["popular"]], default=0)
        beside = {k: sum(k in s and p in s for s in STATS for p in t["objects"]) for k in absent}
        assert min(beside[k] for k in no["adversarial"]) >= max([beside[k] for k in absent if k not in no["adversarial"]], default=0)
    assert pope_items(TRUTHS, STATS) == POPE != pope_items(TRUTHS, STATS, seed=1)
    assert {i["text"] for i in POPE if i["kind"] == "dog"} == {"Is there a dog in the image?"}


def test_a_world_with_too_few_kinds_stays_balanced():
    items = pope_items([dict(image_id=0, image="", objects=["dog", "cup"]), dict(image_id=1, image="", objects=[])], [["bus"]])
    assert [i["label"] for i in items] == ["yes", "no"] * 3          # one absent kind: one pair of questions per split


def test_each_question_is_asked_once():
    asked = distinct_questions(POPE)
    assert len({(q["image_id"], q["text"]) for q in asked.values()}) == len(asked) < len(POPE)
    answers = {k: f"answer {n}" for n, k in enumerate(asked)}
    back = {p["question_id"]: p["text"] for p in spread_answers(POPE, answers)}
    assert all(back[i["question_id"]] == answers[k] for i in POPE for k, q in asked.items() if (q["image_id"], q["text"]) == (i["image_id"], i["text"]))


@pytest.mark.parametrize("text, kinds", [
    ("a teddy bear", ["teddy bear"]), ("a bear and a teddy bear", ["bear", "teddy bear"]), ("two hot dogs and a dog", ["hot dog", "dog"]),
    ("three buses", ["bus"]), ("Mice!", ["mouse"]), ("knives", ["knife"]), ("traffic  lights", ["traffic light"]), ("teddy-bears", ["teddy bear"]),
    ("a busy dogma, a cupboard", []), ("a dog , a dog and dogs", ["dog", "dog", "dog"]), ("", [])])
def test_names_in_a_text(text, kinds):
    found = mentions(text, KINDS)
    assert [k for k, *_ in found] == kinds
    assert all(text[a:b].lower().replace("-", " ").split()[0][:2] == k[:2] or k == "mouse" for k, a, b in found)


def test_the_longest_name_wins_and_words_are_whole():
    assert [k for k, *_ in mentions("a mouse pad and a mouse", ["mouse", "mouse pad"])] == ["mouse pad", "mouse"]
    assert mentions("a bulldog, a hotdog, a minibus", KINDS) == []


def test_every_name_is_found_in_both_numbers():
    assert [k for name in KINDS for k, *_ in mentions(f"the {plural(name)} and the {name}", KINDS)] == [k for k in KINDS for _ in (0, 1)]


def test_chair_counts_mentions_and_sentences():
    items = chair_items([dict(image_id="a", image="", objects=["dog", "cup"]), dict(image_id="b", image="", objects=["bus"])], KINDS)
    s = score("chair", items, [dict(image_id="a", caption="A dog, a bear and a bear."), dict(image_id="b", caption="A bus.")])["metrics"]
    assert s == dict(chair_i=2 / 4, chair_s=1 / 2, recall=2 / 3, length=(7 + 2) / 2)


def test_missing_duplicate_unmatched_and_unparsable_are_counted():
    p = truthful()
    s = score("pope", POPE, p[3:] + p[10:12] + [dict(question_id="nobody", text="Yes.")])
    assert [s[k] for k in ("n", "missing", "duplicate", "unmatched", "unparsable")] == [len(POPE), 3, 2, 1, 0]
    assert s["ids"][0]["unmatched"] == ["nobody"]
    lost = sum(i["split"] == "random" for i in POPE[:3])
    assert s["metrics"]["random/accuracy"] == pytest.approx(1 - lost / sum(i["split"] == "random" for i in POPE))
    first = [p[0] | dict(text="No.")] + p                                 # the first answer is kept
    assert score("pope", POPE, first)["metrics"]["random/accuracy"] < 1 == score("pope", POPE, p + first[:1])["metrics"]["random/accuracy"]
    assert score("pope", POPE, [p[0] | dict(text="a tree")] + p[1:])["unparsable"] == 1
    c = score("chair", CHAIR, described()[1:])
    assert (c["missing"], c["metrics"]["chair_s"], c["images"]) == (1, 0, 40) and c["metrics"]["recall"] < 1
    assert score("chair", CHAIR, [dict(image_id=t["image_id"], caption="Nothing.") for t in TRUTHS])["unparsable"] == 40


def test_precision_recall_and_missing_answers():
    items = [dict(question_id=n, image=f"{n}.png", label="yes" if n < 5 else "no") for n in range(10)]
    says = ["Yes.", "Yes.", "Yes.", "No."] + [None] + ["Yes."] * 2 + ["No."] * 2 + [None]              # two are missing
    m = score("pope", items, [dict(question_id=n, text=s) for n, s in enumerate(says) if s])["metrics"]
    assert [m[f"all/{k}"] for k in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == pytest.approx([5 / 10, 3 / 5, 3 / 5, 3 / 5, 5 / 10])


def test_a_missing_caption_leaves_the_sentences_and_stays_in_the_recall():
    captions = described(lambda o: o + [k for k in KINDS if k not in o][:1])
    s = score("chair", CHAIR, captions[1:])["metrics"]
    assert s["chair_s"] == 1 and s["recall"] == pytest.approx(1 - len(TRUTHS[0]["objects"]) / sum(len(t["objects"]) for t in TRUTHS))


def test_rules_read_differently():
    verbose = [p | dict(text=p["text"].replace("Yes.", "Yes, there is.").replace("No.", "NO")) for p in truthful()]
    acc = {r: score("pope", POPE, verbose, r)["metrics"]["mean/accuracy"] for r in ("llava", "lmms_eval", "vlmevalkit")}
    assert acc == dict(llava=.5, lmms_eval=.5, vlmevalkit=1)              # llava reads NO as a yes, lmms_eval reads no sentence
    assert score("pope", POPE, verbose, "lmms_eval")["unparsable"] == len(POPE) / 2


def test_a_score_is_plain_data_with_the_agreed_keys():
    for s in (score("pope", POPE, noisy(.2, 0)), score("chair", CHAIR, described()), score("chair", CHAIR[:1], described()[:1])):
        assert {"benchmark", "rule", "n", "metrics", "intervals", "missing", "duplicate", "unparsable", "data_sha256"} <= set(s)
        assert json.loads(json.dumps(s, allow_nan=False)) == s
        assert all(i is None or i[0] <= s["metrics"][k] <= i[1] for k, i in s["intervals"].items())


def test_data_sha256_names_the_items_and_not_their_place():
    moved = [i | dict(image="/elsewhere/x.png") for i in POPE[::-1]]
    assert data_sha256(moved) == data_sha256(POPE) != data_sha256([POPE[0] | dict(label="no"), *POPE[1:]])


def test_interval_by_image_is_wider_when_answers_agree():
    rng = np.random.default_rng(0)
    bad = set(rng.permutation(40)[:10].tolist())                          # ten images get only wrong answers
    p = [q | dict(text={"Yes.": "No.", "No.": "Yes."}[q["text"]]) if i["image_id"] in bad else q for q, i in zip(truthful(), POPE)]
    s = score("pope", POPE, p); n = sum(i["split"] == "random" for i in POPE)
    lo, hi = s["intervals"]["random/accuracy"]
    a, b = wilson(round(s["metrics"]["random/accuracy"] * n), n)
    assert hi - lo > 1.5 * (b - a)


def test_coverage():
    accuracy = lambda s: s[..., :1] / s[..., 1:]
    def covers(seed):
        rng = np.random.default_rng(seed)
        right = rng.binomial(6, rng.beta(2, 1, 50))
        lo, hi = bootstrap(np.stack([right, np.full(50, 6)], 1), accuracy, resamples=400)[0]
        return lo <= 2 / 3 <= hi
    assert .88 <= np.mean([covers(s) for s in range(150)]) <= .99


def test_swap_test_is_exact_on_few_images_and_flat_without_effect():
    share = lambda s: s[..., :1] / s[..., 1:]
    one = np.array([[1, 1]] * 6)
    assert swap_test(one, one * [0, 1], share) == pytest.approx([2 / 64])
    p = []
    for seed in range(150):
        rng = np.random.default_rng(seed); base = rng.beta(2, 1, 40)      # answers of both models share the image's difficulty
        a, b = (np.stack([rng.binomial(6, base), np.full(40, 6)], 1) for _ in (0, 1))
        p.append(swap_test(a, b, share, permutations=199)[0])
    assert np.mean(np.array(p) <= .05) < .1 and .35 < np.mean(p) < .65


@pytest.mark.parametrize("seed", range(6))
def test_swap_test_equals_trying_every_swap(seed):
    rng = np.random.default_rng(seed)
    a, b = (np.stack([rng.integers(0, 5, 6), rng.integers(1, 9, 6)], 1) for _ in (0, 1))              # ratios with different denominators
    share = lambda s: s[..., :1] / s[..., 1:]
    null = []
    for swaps in itertools.product([False, True], repeat=6):
        which = np.array(swaps)[:, None]
        null.append(share(np.where(which, b, a).sum(0))[0] - share(np.where(which, a, b).sum(0))[0])
    null, seen = np.array(null), null[0]
    assert swap_test(a, b, share)[0] == pytest.approx(min(1, 2 * min((null >= seen - 1e-12).mean(), (null <= seen + 1e-12).mean())))


def test_large_tables_are_resampled_and_swapped_by_distinct_rows():
    rng = np.random.default_rng(0); share = lambda s: np.stack([s[..., 0] / s[..., 1], s[..., 2] / s[..., 1]], -1)
    few = np.stack([rng.binomial(3, .6, 2500), np.full(2500, 3), rng.binomial(3, .1, 2500)], 1).astype(float)
    unlike = few + rng.random((2500, 1)) * [1, 0, 1]                                                   # every row is its own
    for t in (few, unlike):
        exact = np.sqrt(np.var(t[:, [0, 2]], 0) / 2500) / 3                                            # the units are drawn independently
        slow, fast = bootstrap(t, share), bootstrap_distinct(t, share)
        assert np.allclose(fast, slow, atol=.15 * exact.max()) and np.allclose(np.diff(fast), 2 * 1.96 * exact[:, None], rtol=.1)
    big = np.tile(few, (5, 1))
    assert len(big) > LARGE and (bootstrap(big, share) == bootstrap_distinct(big, share)).all()
    worse = few - (rng.random(2500) < .02)[:, None] * [1, 0, -1] + (rng.random(2500) < .012)[:, None] * [1, 0, 0]
    a, b = swap_test(few, worse, share), swap_distinct(few, worse, share)
    assert 1e-3 < a[0] < .9 and np.allclose(a, b, atol=4 * np.sqrt(np.maximum(a, 1e-3) / 2000))
    assert (swap_distinct(few, worse, share) == swap_distinct(worse, few, share)).all() and (swap_distinct(few, few, share) == 1).all()
    assert (swap_test(big, np.tile(worse, (5, 1)), share) == swap_distinct(big, np.tile(worse, (5, 1)), share)).all()


def test_hundred_thousand_predictions_are_scored_in_seconds():
    """One process: a time limit with room for a busy machine, and the memory of the whole process."""
    code = """if True:
        import pathlib, re, time
        from realign_nb.bench import score
        items = [dict(question_id=n, image=f"{n // 6}.jpg", text="Is there a dog?", label="yes" if n % 2 else "no", category=("random", "popular")[n % 4 < 2]) for n in range(100_000)]
        said = [dict(question_id=n, text="Yes" if n * 7919 % 10 < 6 else "No, there is none.") for n in range(100_000)]
        start = time.process_time(); s = score("pope", items, said)
        low, high = s["intervals"]["mean/accuracy"]
        assert low < s["metrics"]["mean/accuracy"] < high < low + .01
        status = pathlib.Path("/proc/self/status")                        # the most memory of this process; 0 where the system does not say
        print(time.process_time() - start, int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024 if status.exists() else 0)"""
    seconds, megabytes = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert seconds < 10 and megabytes < 500, (seconds, megabytes)


def test_the_import_is_light():
    code = "import sys, time; t = time.perf_counter(); import realign_nb.bench; print(time.perf_counter() - t, *[m for m in ('torch', 'pandas', 'scipy', 'PIL', 'transformers') if m in sys.modules])"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    assert [r[1:] for r in runs] == [[]] * 5 and sorted(float(r[0]) for r in runs)[2] <= .5


def test_comparison_is_signed_paired_and_symmetric():
    a, b = noisy(.1, 1), noisy(.4, 2)
    c, back = compare("pope", POPE, a, b), compare("pope", POPE, b, a)
    sa, sb = score("pope", POPE, a)["metrics"], score("pope", POPE, b)["metrics"]
    assert all(c["difference"][k] == pytest.approx(sa[k] - sb[k]) == pytest.approx(-back["difference"][k]) for k in sa)
    assert c["intervals"]["mean/accuracy"][0] > 0 and c["p"]["mean/accuracy"] < .01
    m = c["mcnemar"]["random"]; n = sum(i["split"] == "random" for i in POPE)
    assert (m["a_only"] - m["b_only"]) / n == pytest.approx(c["difference"]["random/accuracy"])
    assert all(c["p"][k] <= c["p_holm"][k] <= 1 for k in c["p"]) and c["p_holm"]["mean/accuracy"] == min(1, holm(list(c["p"].values()))[list(c["p"]).index("mean/accuracy")])
    none = compare("pope", POPE, a, a)
    assert set(none["difference"].values()) == {0} and set(none["p"].values()) == {1} and none["mcnemar"]["random"]["p"] == 1


def test_pairing_narrows_the_interval():
    a, b = noisy(.5, 3), noisy(.5, 3)
    b[0] = b[0] | dict(text="No.")                                        # the same bad model but for one answer
    ends = compare("pope", POPE, a, b)["intervals"]["random/accuracy"]
    alone = score("pope", POPE, a)["intervals"]["random/accuracy"]
    assert ends[1] - ends[0] < (alone[1] - alone[0]) / 4


def test_seeds_are_averaged_before_images_are_drawn():
    arms = {s: noisy(.2, s) for s in (0, 1, 2)}
    s, single = score_seeds("pope", POPE, arms), [score("pope", POPE, p)["metrics"] for p in arms.values()]
    assert s["metrics"]["random/accuracy"] == pytest.approx(np.mean([m["random/accuracy"] for m in single]))
    assert s["spread"]["random/accuracy"] == pytest.approx(np.std([m["random/accuracy"] for m in single], ddof=1))
    c = compare_seeds("pope", POPE, arms, {0: noisy(.5, 9)})
    assert c["seeds"] == [0, 1, 2] and c["difference"]["random/accuracy"] == pytest.approx(np.mean([d["random/accuracy"] for d in c["per_seed"]]))
    turned = compare_seeds("pope", POPE, {0: noisy(.5, 9)}, arms)
    assert turned["spread"]["random/accuracy"] == pytest.approx(c["spread"]["random/accuracy"])
    with pytest.raises(ValueError, match="the same seeds"): compare_seeds("pope", POPE, arms, {0: arms[0], 5: arms[1]})


def test_all_arms_of_a_run():
    run = lambda share, seed: dict(pope=noisy(share, seed), chair=described(lambda o: o + ["cup"] if share > .3 else o))
    arms = dict(base={0: run(.5, 0)}, rdpo={s: run(.1, s) for s in (1, 2)}, sft={s: run(.2, s) for s in (1, 2)})
    scores, comparisons = score_arms(dict(pope=POPE, chair=CHAIR), arms)
    assert [(c["a"], c["b"]) for c in comparisons] == [("rdpo", "base"), ("sft", "base"), ("rdpo", "sft")]
    assert list(scores["rdpo"]) == [1, 2, "all"] and scores["rdpo"][1]["pope"] == score("pope", POPE, arms["rdpo"][1]["pope"])
    assert comparisons[0]["chair"]["difference"]["chair_i"] < 0


def test_holm_and_mcnemar():
    assert holm([.01, .04, .03]).tolist() == pytest.approx([.03, .06, .06]) and holm([.5, .9]).tolist() == [1, 1]
    assert mcnemar([1] * 5 + [0] * 3, [0] * 5 + [0] * 3) == dict(a_only=5, b_only=0, p=2 / 32)


@pytest.mark.parametrize("call, text", [
    (lambda: score("pope", POPE, CHAIR), "is this the right file"),
    (lambda: score("pope", POPE, [dict(question_id="x", text="Yes.")]), "no prediction fits an item"),
    (lambda: score("pope", POPE + POPE[:1], []), "stands twice"),
    (lambda: score("pope", [POPE[0] | dict(label="1")], []), "labels are yes and no"),
    (lambda: score("pope", POPE, [], "gpt"), "known: llava"),
    (lambda: score("gqa", POPE, []), "known: pope, mme, hallusionbench, scienceqa, mmbench, textvqa, vizwiz, mmvet, llavabench, chair"),
    (lambda: score("chair", [], []), "no chair items"),
    (lambda: score("pope", POPE, truthful() + [dict(question_id=POPE[0]["question_id"], text=None)]), f"prediction {len(POPE) + 1}: 'text' is None"),
    (lambda: score("pope", POPE, truthful() + [dict(text="Yes.")]), f"prediction {len(POPE) + 1} needs 'question_id'"),
    (lambda: pope_items(TRUTHS, []), "counted on them")])
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text): call()
