"""Traps of the official scripts and of toolkits that the other files do not test, benchmark by benchmark; then what must hold for all, and broken files."""
import contextlib
import csv
import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from test_properties import CASES

from realign_nb.bench import FAMILIES, compare, count, find_benchmark, parse, score
from realign_nb.core import ImageError
from realign_nb.doctor import COUNTS
from realign_nb.eval_cli import main_eval
from realign_nb.infer import open_item
from realign_nb.judged import pair_metrics
from realign_nb.readers import LETTER, MAX_NEW_TOKENS, SHORT, prompt, prompt_name
from realign_nb.tables import DENOMINATORS, count_behind
from realign_nb.templates import LLAVABENCH, MMVET, fill, item_fields, read_reply, requests

KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")


def lines(rows, end="\n"): return "".join(json.dumps(r) + end for r in rows)


def scored(folder, benchmark, items, said, *more):
    "Status, score and what was said on stderr; `items` and `said` are records, texts or bytes, or {name: one of these}."
    names = []
    for kind, data in (("items.jsonl", items), ("said.jsonl", said)):
        name, data = next(iter(data.items())) if isinstance(data, dict) else (kind, data)
        data = lines(data) if isinstance(data, list) else data
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode()); names.append(folder / name)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main_eval(["score", benchmark, "--items", str(names[0]), "--predictions", str(names[1]), "--json", *map(str, more)])
    return status, json.loads(out.getvalue() or "null"), err.getvalue()


# ---- the paper's own numbers

def test_paper_sqa_is_the_total_of_4241_and_not_the_image_split():
    assert DENOMINATORS["SQA"] == 4241
    counts = {c: [p for p in (f"{100 * c / 4241:.2f}", f"{int(1e4 * c / 4241) / 100:.2f}") if count_behind(p, 4241)["count"] == c] for c in (2800, 2798, 2776, 2792, 2888, 3224, 3241, 3243, 2810, 3226)}
    assert all(counts.values()) and count_behind("66.02", 4241)["count"] == 2800 and count_behind("76.02", 4241)["count"] == 3224


@pytest.mark.parametrize("printed, n, c", [("88.14", 2910, 2565), ("87.23", 3000, 2617), ("85.10", 3000, 2553), ("64.60", 1164, 752), ("88.94", 2910, None)])
def test_paper_cells_are_counts_over_the_files_it_used(printed, n, c): assert count_behind(printed, n)["count"] == c


# ---- POPE

def test_pope_mean_f1_is_the_mean_of_three_f1_and_not_one_f1_of_all():
    items = [dict(question_id=n, image=f"{n}.jpg", text="?", label="yes" if n % 2 else "no", category=s) for n, s in enumerate(["random"] * 4 + ["popular"] * 4 + ["adversarial"] * 40)]
    m = score("pope", items, [dict(question_id=n, text="Yes" if n >= 8 else i["label"]) for n, i in enumerate(items)])["metrics"]
    assert [m[f"{s}/f1"] for s in ("random", "popular", "adversarial")] == pytest.approx([1, 1, 2 / 3]) and m["mean/f1"] == pytest.approx(8 / 9) != pytest.approx(2 * 24 / (2 * 24 + 20))


@pytest.mark.parametrize("rule", ["llava", "lmms_eval", "vlmevalkit"])
@pytest.mark.parametrize("says, ratio", [("Yes", 1), ("No", 0)])
def test_pope_yes_ratio_is_of_the_answers_and_not_of_the_labels(rule, says, ratio):
    items, said = CASES["pope"][0]()
    assert score("pope", items, [p | dict(text=says) for p in said], rule)["metrics"]["mean/yes_ratio"] == ratio


def test_pope_command_warns_where_the_rules_differ(tmp_path):
    items = [dict(question_id=n, image=f"{n}.jpg", text="?", label="no", category="random") for n in range(200)]
    said = [dict(question_id=n, text="No") for n in range(200)]
    for wordy, warns in ((1, False), (2, True)):
        status, s, err = scored(tmp_path, "pope", items, [p | dict(text="NO") if n < wordy else p for n, p in enumerate(said)])
        assert (status, "the rules llava, lmms_eval, vlmevalkit differ on 2 of 200 answers (1.0%)" in err) == (0, warns) and s["rule"] == "llava"


# ---- HallusionBench

@pytest.mark.parametrize("visual, bare", [("0", True), (0, True), ("1", False), (1, False), ("2", False)])
def test_hallusionbench_shows_the_picture_whether_the_field_is_text_or_number(visual, bare, tmp_path):
    "The released script compares the text '1' with a number, so that no picture is ever shown; the corrected one asks without a picture that it cannot load."
    item = dict(visual_input=visual, image="not_there.png")
    if bare: assert open_item("hallusionbench", item, tmp_path) is None; return
    for broken in (item, item | dict(image=None), dict(visual_input=visual)):
        with pytest.raises(ImageError): open_item("hallusionbench", broken, tmp_path)


@pytest.mark.parametrize("reply, official, ours", [("correct", 1, "correct"), ("Incorrect.", 0, "incorrect"), ("not correct", 1, None), ("isn't correct", 1, None), ("wrong", 2, None), ("unclear", 2, "unclear"),
                                                   ("correct or incorrect", 0, None), ("", None, None)])
def test_hallusionbench_not_correct_is_read_as_correct_officially_and_asked_again_by_our_judge(reply, official, ours):
    assert (parse("hallusionbench", reply), read_reply("hallusionbench", reply)) == (official, ours)


def test_hallusionbench_unclear_is_right_only_at_figure_0_of_vs():
    one = lambda category, figure: dict(zip(KEY, (category, "map", "0", figure, "0"))) | dict(visual_input="1", gt_answer="1")
    right = lambda i: score("hallusionbench", [i], [{k: i[k] for k in KEY} | dict(reply="unclear", judge="j")])["metrics"]["a"]
    assert [right(one(c, f)) for c, f in (("VS", "0"), ("VS", 0), ("VS", "1"), ("VD", "0"))] == [100, 100, 0, 0]


def test_hallusionbench_sets_of_two_subcategories_share_numbers_and_do_not_mix():
    items = [dict(zip(KEY, ("VD", sub, "0", "0", "0"))) | dict(visual_input="1", gt_answer="1") for sub in ("chart", "map")]
    m = score("hallusionbench", items, [{k: i[k] for k in KEY} | dict(reply=r, judge="j") for i, r in zip(items, ("correct", "incorrect"))])["metrics"]
    assert (m["q"], m["f"], m["Easy"], m["a"]) == (50, 50, 50, 50)


@pytest.mark.parametrize("kind", [str, int])
def test_hallusionbench_easy_and_hard_part_at_visual_input_2_in_text_and_number(kind):
    items = [dict(zip(KEY, ("VD", "map", "0", str(v), "0"))) | dict(visual_input=kind(v), gt_answer="1") for v in (1, 2)]
    m = score("hallusionbench", items, [{k: i[k] for k in KEY} | dict(reply=r, judge="j") for i, r in zip(items, ("incorrect", "correct"))])["metrics"]
    assert (m["q"], m["Easy"], m["Hard"], m["f"], m["a"]) == (0, 0, 100, 50, 50)


def test_hallusionbench_command_scores_all_rows_or_those_with_a_picture(tmp_path):
    items, said = CASES["hallusionbench"][0]()
    whole, part = (scored(tmp_path, "hallusionbench", {"HallusionBench.json": json.dumps(items).encode()}, said, *more)[1] for more in ((), ("--image-only",)))
    assert (whole["n"], part["n"], part["unmatched"]) == (len(items), sum(i["visual_input"] != "0" for i in items), 0) and part["n"] < whole["n"]


# ---- ScienceQA

def test_scienceqa_prompt_has_no_context_line_without_a_hint():
    item = dict(question="Which?", choices=["x", "y"], hint="")
    assert prompt("scienceqa", item) == f"Which?\nA. x\nB. y{LETTER}" and prompt("scienceqa", item | dict(hint="Look.")) == f"Context: Look.\nWhich?\nA. x\nB. y{LETTER}"


def test_scienceqa_both_accuracies_stand_side_by_side_under_both_rules():
    items, said = CASES["scienceqa"][0]()
    said = [p | dict(text=p["text"] + ".") if i["image"] else p for i, p in zip(items, said)]          # "A." fails officially
    m = {r: score("scienceqa", items, said, r)["metrics"] for r in ("llava", "lenient")}
    assert (m["llava"]["accuracy"], m["llava"]["image_accuracy"], m["lenient"]["accuracy"], m["lenient"]["image_accuracy"]) == (50, 0, 100, 100)


# ---- TextVQA and VizWiz

def test_textvqa_with_and_without_ocr_tokens_have_names_of_their_own():
    item = dict(question_id=1, question="who?", ocr_tokens=["A", "b"])
    assert (prompt_name("textvqa"), prompt_name("textvqa", False)) == ("llava/textvqa_ocr", "llava/textvqa_no_ocr")
    assert prompt("textvqa", item) == f"Who?\nReference OCR token: A, b{SHORT}" and prompt("textvqa", item, False) == f"Who?{SHORT}"


def test_vqa_comma_between_digits_is_a_dead_branch_in_llava_only():
    assert [parse("textvqa", "1,000-x", r) for r in ("llava", "vqa", "vlmevalkit")] == ["1000 x", "1000x", "1000x"]


def test_vqa_ten_equal_answers_skip_the_normaliser_only_in_the_original():
    item = dict(question_id=1, answers=["Stop."] * 10)
    said = lambda text: [score("textvqa", [item], [dict(question_id=1, text=text)], r)["metrics"]["accuracy"] for r in ("llava", "vqa", "vlmevalkit")]
    assert said("stop") == [100, 0, 100] and said("Stop.") == [100] * 3


# ---- MM-Vet and LLaVA-Bench

def test_mmvet_request_ends_with_an_open_row_and_spaced_marks():
    item = dict(question_id="v1_0", question="Which?", answer="a<AND>b<OR>c")
    text = requests("mmvet", [item], [dict(question_id="v1_0", text="x | y")], MMVET)[0]["v1_0"]
    assert text.endswith("\n\nWhich? | a <AND> b <OR> c | x | y | ") and (MMVET.max_tokens, MMVET.temperature, MMVET.step, MMVET.tries) == (3, 0, .5, 5)
    table = MMVET.user.split("\n\n")[1].splitlines()
    assert len(table) == 2 + 7 and all(row.count("|") == 3 for row in table)


def test_llavabench_rounds_the_means_first():
    sums = np.array([[11., 16., 3.]])                       # 5.333/3.667 is 145.4 %, 16/11 is 145.5 %
    assert pair_metrics(["all"], sums)["all"] == 145.4


def test_llavabench_reference_stands_first_in_the_request():
    item = dict(question_id=0, category="conv", caption="c", text="q", reference="REF")
    text = fill(LLAVABENCH, item_fields("llavabench", item, LLAVABENCH) | dict(prediction="OURS"))
    assert text.index("REF") < text.index("OURS") and (LLAVABENCH.temperature, LLAVABENCH.max_tokens) == (.2, 1024)


@pytest.mark.parametrize("bad", ["-1 -1", "I cannot judge that.", None])
def test_llavabench_wholly_failed_category_is_no_100(bad):
    items, said = CASES["llavabench"][0]()
    m = score("llavabench", items, [p | dict(reply=bad) if i["category"].endswith("detail") else p for i, p in zip(items, said)])["metrics"]
    assert m["detail"] is None and m["all"] == m["conv"] == 100


def test_llavabench_reference_of_nothing_but_zeros_is_no_number():
    items, said = CASES["llavabench"][0]()
    assert set(score("llavabench", items, [p | dict(reply="0 8") for p in said])["metrics"].values()) == {None}


def test_judged_mean_is_over_runs_and_the_spread_is_of_the_population():
    items = [dict(question_id=n) for n in range(2)]
    s = score("mmvet", items, [dict(question_id=n, reply=r, run=k, judge="j") for k, rs in enumerate((("1", "1"), ("1", "0"))) for n, r in enumerate(rs)])
    assert (s["metrics"]["total"], s["spread"]["total"], s["runs"]) == (75, 25, 2)


def test_judged_failure_and_later_reply_of_one_record_do_not_depend_on_the_order():
    items, said = CASES["mmvet"][0]()
    failed = [said[0] | dict(reply=None, failed="time-out")]
    first, last = score("mmvet", items, failed + said), score("mmvet", items, said + failed)
    assert (first["unjudged"], first["metrics"]) == (last["unjudged"], last["metrics"]) == (0, last["metrics"])


def test_two_judges_are_not_compared():
    items, said = CASES["mmvet"][0]()
    a, b = ([p | dict(judge=j) for p in said] for j in ("one", "other"))
    with pytest.raises(ValueError, match="different judges"): compare("mmvet", items, a, b)
    with pytest.raises(ValueError, match="none named, one"): score("mmvet", items, [a[0], *({k: v for k, v in p.items() if k != "judge"} for p in said[1:])])
    with pytest.raises(ValueError, match="no item has a verdict on both sides"): compare("mmvet", items, a, [p | dict(reply=None) for p in a])


def test_judged_score_names_day_and_text():
    items, said = CASES["mmvet"][0]()
    s = score("mmvet", items, [p | dict(date="2026-11-01", template="t", template_sha256="0") for p in said])
    assert "2026-11-01" in json.dumps(s) and '"t"' in json.dumps(s)


# ---- MME

def test_mme_prompt_has_llavas_ending_and_not_its_own():
    assert prompt("mme", dict(question="Is it red? Please answer yes or no.")) == "Is it red?" + SHORT == prompt("mme", dict(question="Is it red?"))


def test_mme_sums_are_over_ten_and_four_subtasks():
    items, said = CASES["mme"][0]()
    m = score("mme", items, [p | dict(text="other") if i["category"] == "OCR" else p for i, p in zip(items, said)])["metrics"]
    assert (m["perception"], m["cognition"], m["OCR/score"], sum(k.endswith("/score") for k in m)) == (1800, 800, 0, 14)


# ---- LLaVA's own answer files

@pytest.mark.parametrize("benchmark, field", [("mmbench", "index"), ("scienceqa", "id")])
def test_question_id_of_an_answer_file_stands_for_the_id(benchmark, field):
    items, said = CASES[benchmark][0]()
    if field == "id": items = [{k: v for k, v in i.items() if k != "question_id"} | dict(id=i["question_id"]) for i in items]
    own = "index" if field == "index" else "question_id"
    llava = [dict(question_id=p[own], prompt="?", text=p.get("prediction", p.get("text"))) for p in said]
    assert score(benchmark, items, llava)["metrics"] == score(benchmark, CASES[benchmark][0]()[0], said)["metrics"]


# ---- MMBench

def test_mmbench_prompt_joins_the_hint_by_a_line_and_says_nothing_of_several_options():
    item = dict(hint="Look.", question="What?", A="x", B="y", C="")
    assert prompt("mmbench", item) == f"Look.\nWhat?\nA. x\nB. y{LETTER}"


def test_mmbench_same_unreadable_answer_is_wrong_every_time():
    item = dict(index=1, A="x", B="y", answer="A")
    assert {score("mmbench", [item], [dict(index=1, prediction="hm")], r)["metrics"]["vanilla"] for r in ("exact", "judged", "strict") for _ in range(20)} == {0}


# ---- CHAIR

def test_chair_is_named_by_its_rule_and_the_mean_length_stands_beside():
    items = [dict(image_id=1, objects=["dog"], references=["A dog and a bus."])]
    s = score("chair", items, [dict(image_id=1, caption="A dog, a dog, a cat.")], "chair_pattern")
    assert s["rule"] == "chair_pattern" and s["metrics"] == dict(chair_i=pytest.approx(1 / 3), chair_s=1, recall=1, length=6)     # mentions, not kinds; the single bus is not seen


# ---- all of them

def test_lengths_are_those_of_llavas_scripts():
    assert {b: MAX_NEW_TOKENS[b] for b in FAMILIES} == {b: 128 if b in ("pope", "mme", "textvqa", "vizwiz") else 512 if b == "chair" else 1024 for b in FAMILIES}


def test_official_sizes_are_known_to_the_doctor():
    fake = lambda n, **kw: [dict(image=f"{k}", index=k, question_id=k, **kw) for k in range(n)]
    known = {k: v[1] for b, n in (("scienceqa", 4241), ("textvqa", 5000), ("mmvet", 218), ("llavabench", 60)) for k, v in {f"{b} {w}": x for w, x in COUNTS[b](fake(n)).items()}.items()}
    assert known["scienceqa questions"] == (4241,) and known["scienceqa questions with a picture"] == (2017,) and known["textvqa questions"] == (5000,) and known["mmvet questions"] == (218,)
    assert (known["llavabench questions"], known["llavabench pictures"]) == ((60,), (24,)) and COUNTS["vizwiz"](fake(1, answers=[]))["questions"][1] == (4319,)
    assert COUNTS["mmbench"](fake(1)) == {"rows with rotations": (1, (4329, 4377)), "questions": (1, (1164, 1176))}


@pytest.mark.parametrize("benchmark", CASES)
def test_counts_of_shards_add_up_to_the_whole(benchmark):
    "Items and predictions are cut by unit; the sums of both halves are those of the whole, group by group."
    make, *_, field, wrong, _ = CASES[benchmark]
    items, said = make()
    said = [p | {field: wrong(i)} if n % 4 == 1 else p for n, (i, p) in enumerate(zip(items, said))]
    unit, sums = find_benchmark(benchmark).unit, lambda c: dict(zip(c.groups, c.table.sum((0, 1))))
    half = {u: n % 2 for n, u in enumerate(sorted({str(unit(i)) for i in items}))}
    whole, parts = sums(count(benchmark, items, said)), [sums(count(benchmark, *zip(*[x for x in zip(items, said) if half[str(unit(x[0]))] == k]))) for k in (0, 1)]
    assert all(np.allclose(v, sum(p.get(g, 0 * v) for p in parts)) for g, v in whole.items())


@pytest.mark.parametrize("benchmark", CASES)
def test_one_wrong_answer_changes_the_counts_of_one_unit(benchmark):
    make, *_, field, wrong, _ = CASES[benchmark]
    items, said = make()
    before = count(benchmark, items, said)
    for n in range(len(items)):
        after = count(benchmark, items, said[:n] + [said[n] | {field: wrong(items[n])}] + said[n + 1:])
        assert [u for u, d in zip(before.units, (before.flat != after.flat).any(1)) if d] == [str(find_benchmark(benchmark).unit(items[n]))]


def test_every_scorer_is_imported_without_the_heavy_packages():
    code = """if True:
        import sys, time; start = time.perf_counter()
        from realign_nb import bench, join, yes_no, choice, vqa, judged, judges, templates, chair, readers, doctor, infer, eval_cli, eval_files, tables
        print(time.perf_counter() - start < 2, *[m for m in ('torch', 'pandas', 'scipy', 'PIL', 'datasets', 'nltk', 'openai', 'matplotlib', 'transformers') if m in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["True"]


def test_every_benchmark_scores_many_records_in_linear_time():
    "A tenth of 100 000 records of every benchmark within a tenth of ten seconds each, and in 500 MB together."
    code = """if True:
        import pathlib, re, sys, time
        sys.path.insert(0, sys.argv[1])
        from test_properties import CASES
        from realign_nb.bench import find_benchmark, score
        for b, (make, *_) in CASES.items():
            (items, said), keys = make(), find_benchmark(b).keys
            own = {"question_id", "image", "image_id", "set_id"}
            copy = lambda rows, k: [{f: f"{v}-{k}" if f in own else v + k * 10_000 if f == "index" else v for f, v in r.items()} for r in rows]
            rounds = range(-(-10_000 // len(items))) if b != "mmbench" else range(99)
            items, said = ([x for k in rounds for x in copy(rows, k)] for rows in (items, said))
            start = time.process_time(); s = score(b, items, said); spent = time.process_time() - start
            assert s["missing"] == 0 and spent < len(items) / 10_000 * 1.5, (b, spent)
        status = pathlib.Path("/proc/self/status")
        print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024 if status.exists() else 0)"""
    r = subprocess.run([sys.executable, "-c", code, __file__.rpartition("/")[0]], capture_output=True, text=True)
    assert r.returncode == 0 and float(r.stdout) < 500, r.stderr[-500:] + r.stdout


# ---- files

ITEMS, SAID = CASES["pope"][0]()
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name, data", [
    ("bom.jsonl", BOM + lines(SAID).encode()), ("crlf.jsonl", lines(SAID, "\r\n")), ("blank.jsonl", "\n" + lines(SAID, "\n\n")), ("list.json", json.dumps(SAID)),
    ("excel.csv", BOM + b"question_id,text\r\n" + "".join(f'{p["question_id"]},"{p["text"]}"\r\n' for p in SAID).encode()), ("tabs.tsv", "question_id\ttext\n" + "".join(f'{p["question_id"]}\t{p["text"]}\n' for p in SAID)),
    ("texts.jsonl", lines([p | dict(question_id=str(p["question_id"])) for p in SAID])), ("more.jsonl", lines([p | dict(prompt="p", metadata={}) for p in SAID]))], ids=lambda x: x if isinstance(x, str) and len(x) < 20 else "")
def test_files_of_every_make_give_the_same_score(name, data, tmp_path):
    assert scored(tmp_path, "pope", ITEMS, {name: data}) == scored(tmp_path, "pope", ITEMS, SAID) and scored(tmp_path, "pope", ITEMS, SAID)[0] == 0


@pytest.mark.parametrize("change", [lambda k: 10**30 + k, lambda k: 2**53 + k, lambda k: f"Ümlaut/{k}", lambda k: f"a|{k}", lambda k: f" {k}\u2028"], ids=["huge", "above doubles", "unicode", "bar", "blanks"])
def test_ids_of_every_kind_join(change, tmp_path):
    new = lambda rows: [r | dict(question_id=change(r["question_id"])) for r in rows]
    status, s, _ = scored(tmp_path, "pope", new(ITEMS), new(SAID))
    assert (status, s["missing"], s["unmatched"], s["metrics"]["mean/accuracy"]) == (0, 0, 0, 1)


@pytest.mark.parametrize("name, data, says", [
    ("e.jsonl", "", "e.jsonl: holds no record"), ("e.json", "[]", "holds no record"), ("n.json", "null", "a record with fields is needed"), ("s.jsonl", "[1, 2]\n", "a record with fields is needed"),
    ("p.jsonl.gz", gzip.compress(lines(SAID).encode()), "of an unknown kind"), ("gz.jsonl", gzip.compress(lines(SAID).encode()), "gz.jsonl: not UTF-8 text"), ("w.jsonl", lines(SAID).encode("utf-16"), "not UTF-8 text"),
    ("torn.jsonl", lines(SAID)[:-9], "torn.jsonl, line 30: not JSON"), ("c.jsonl", lines([dict(id=1, answer="Yes")]), "c.jsonl, line 1: prediction 1 needs 'question_id'"),
    ("null.jsonl", lines([dict(SAID[0], text=None)]), "'text' is None, not a text"), ("int.jsonl", lines([dict(SAID[0], text=1)]), "'text' is 1, not a text"), ("nan.jsonl", '{"question_id": 0, "text": NaN}\n', "not a text"),
    ("f.jsonl", lines([p | dict(question_id=float(p["question_id"])) for p in SAID]), "no prediction fits an item: question_id '0.0' there"), ("h.csv", "question_id,text\n", "holds no record"),
    ("r.csv", "question_id,text\n0,Yes, sure\n", "r.csv, line 2: has another number of cells"), ("semi.csv", "question_id;text\n0;Yes\n", "needs 'question_id'")], ids=lambda x: x if isinstance(x, str) and "." in x and len(x) < 12 else "")
def test_broken_predictions_are_errors_that_name_the_place(name, data, says, tmp_path):
    status, s, err = scored(tmp_path, "pope", ITEMS, {name: data})
    assert (status, s) == (2, None) and says in err and "Traceback" not in err


@pytest.mark.parametrize("items, says", [("", "holds no record"), (ITEMS + ITEMS[:1], "question_id '0' stands twice"), (ITEMS + [ITEMS[0] | dict(question_id="0")], "question_id '0' stands twice"),
                                         ([{k: v for k, v in i.items() if k != "label"} for i in ITEMS], "label None"), ([i | dict(label="Yes") for i in ITEMS], "POPE's labels are yes and no"), (SAID, "label None")])
def test_broken_items_are_errors_that_name_the_record(items, says, tmp_path):
    status, s, err = scored(tmp_path, "pope", items, SAID)
    assert (status, s) == (2, None) and says in err


@pytest.mark.parametrize("benchmark", ["scienceqa", "mmbench", "mmvet", "llavabench", "pope", "textvqa", "chair"])
def test_items_need_no_picture_to_be_scored(benchmark, tmp_path):
    items, said = CASES[benchmark][0]()
    assert scored(tmp_path, benchmark, [{k: v for k, v in i.items() if k != "image"} for i in items], said)[0] == 0


@pytest.mark.parametrize("case", ["cell", "records", "manifest", "run", "latin"])
def test_no_broken_file_is_a_traceback(case, tmp_path):
    old = csv.field_size_limit(131072)                          # as a fresh process has it
    try:
        if case == "cell": assert scored(tmp_path, "pope", ITEMS, {"p.csv": "question_id,text\n0," + "y" * 200_000 + "\n"})[0] in (0, 2)
        if case == "records": assert scored(tmp_path, "pope", ITEMS, SAID, "--records", tmp_path / "nowhere" / "r.jsonl")[0] == 2
        if case == "manifest": (tmp_path / "manifest.json").write_text("{}"); assert scored(tmp_path, "pope", ITEMS, SAID)[0] == 0
        if case == "run":
            items, said = CASES["mmvet"][0](); said[1]["run"] = "x"
            status, _, err = scored(tmp_path, "mmvet", items, said); assert status == 2 and "run" in err
        if case == "latin":
            status, _, err = scored(tmp_path, "pope", ITEMS, {"p.csv": "question_id,text\n0,café\n".encode("latin-1")}); assert status == 2 and "p.csv" in err
    finally: csv.field_size_limit(old)
