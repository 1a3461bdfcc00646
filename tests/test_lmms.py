"""Logs in the form of lmms-eval, old and new, of every benchmark: the score of an imported log is the direct one, whatever the order, the shards and the toolkit's own parse."""
import importlib.util
import json
import random

import pytest
import yaml

import official_world as world
from realign_nb.bench import score
from realign_nb.lmms import TASKS, claimed_mean, lmms_judgements, lmms_samples
from realign_nb.lmms_tasks import SOURCES, ask, command_line, write_tasks
from realign_nb.readers import HUB, MAX_NEW_TOKENS, prompt, read_items
from realign_nb.sources import ReadError

ALL = list(world.WRITERS)
FIRST = {TASKS[t][0]: t for t in SOURCES}                               # benchmark -> its task
RULES = dict(hallusionbench="yes_no", chair="chair_pattern")            # the others: the default
SCORED = [b for b in ALL if b not in ("mmvet", "llavabench")]           # without a judge
BARE = ["pope", "mme", "scienceqa", "textvqa", "vizwiz"]                # a log of today does not hold their questions


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Per benchmark: rows of the data set by split, the items that these rows give, and answers by row."
    out = {}
    for b, folder in world.write_all(tmp_path_factory.mktemp("official")).items():
        splits = world.hub_rows(b, read_items(b, folder))
        out[b] = splits, {(s, n): said(b, r, n) for s, rows in splits.items() for n, r in enumerate(rows)}
    return out


def said(b, row, n):
    "Two right answers, one of them verbose, then a wrong one."
    truth = dict(pope=lambda: row["answer"], mme=lambda: row["answer"], hallusionbench=lambda: ("no", "yes")[int(row["gt_answer"])], scienceqa=lambda: "ABCDE"[row["answer"]],
                 mmbench=lambda: row["answer"], textvqa=lambda: row["answers"][0], vizwiz=lambda: row["answers"][0], chair=lambda: f"A picture with a {row['gt_object'][0]}.").get(b, lambda: row["question"])()
    yes_no = b in ("pope", "mme", "hallusionbench")
    verbose = f"{truth.capitalize()}, that is so" if yes_no else f"The answer is {truth}." if b in ("scienceqa", "mmbench") else truth
    return (f" {truth}\n", verbose, "no" if truth.lower() == "yes" else "yes" if yes_no else "a sofa")[n % 3]


def items_of(b, splits):
    "What the readers make of the data set, pictures aside."
    out, seen = [], {}
    for rows in splits.values():
        for n, r in enumerate(rows): out.append(HUB[b]({k: v for k, v in r.items() if k != "image"}, n, lambda name, r=r: name if r["image"] is not None else None))
    if b == "mme":
        for i in out: k = i["question_id"]; seen[k] = seen.get(k, -1) + 1; i["question_id"] = f"{k}/{seen[k]}"
    return out


def scoring(b, row, text, n):
    "What a task's own scoring puts into the line."
    text = text.strip()
    if b == "pope": return dict(pope_accuracy=dict(question_id=row["question_id"], score=float(text.lower() == row["answer"]), prediction=text.lower(), ground_truth=row["answer"]))
    if b == "mme": return dict(mme_perception_score=dict(question_id=row["question_id"], category=row["category"], score=float(text.lower() == row["answer"].lower())))
    if b == "hallusionbench": return dict(aAcc={k: v for k, v in row.items() if k != "image"} | dict(model_prediction=text))
    if b == "scienceqa": return dict(exact_match=float(text == "ABCDE"[row["answer"]]))
    if b == "mmbench": return dict(gpt_eval_score={k: v for k, v in row.items() if k != "image"} | dict(prediction=text))
    if b == "textvqa": return dict(exact_match=float(text in row["answers"]), submission=dict(question_id=row["question_id"], answer=text))
    if b == "vizwiz": return dict(exact_match=float(text in row["answers"]), submission=dict(image=f"{row['question_id']}.jpg", answer=text))
    if b == "mmvet": return dict(gpt_eval_score=dict(question_id=row["question_id"], question=row["question"], gt_answer=row["answer"], capabilities=row["capability"], pred_answer=text, score=.5, eval_model="judge-1"))
    if b == "chair": return dict(coco_cap_chair_i=dict(answer=row["gt_object"], pred=[], image_id=int(row["question_id"])))
    review = dict(question=row["question"], ans1=row["gpt_answer"], ans2=text, context=row["caption"], category=f"llava_bench_{row['category']}", review=f"{5+n%5} {n%5+1}\nFine.", scores=[5+n%5, n%5+1], eval_model="judge-1")
    return dict(gpt_eval_llava_all=review)


def line(b, row, text, n, form):
    "One line of a log: `old` with the question, `new` without, `ours` as by the tasks of write_tasks."
    target = "ABCDE"[row["answer"]] if b == "scienceqa" else str(row.get("answer", row.get("gt_answer")))
    asked = ask(row, dict(benchmark=b))
    if form == "old": return dict(doc_id=n, doc={k: v for k, v in row.items() if "image" not in k}, target=target, input=asked, arguments={}, resps=[[text]], filtered_resps=[text], **scoring(b, row, text, n))
    plain = {k: v for k, v in row.items() if k != "image"} | (dict(has_image=row["image"] is not None) if b == "scienceqa" else {})
    kept = dict(realign=plain) if form == "ours" else scoring(b, row, text, n)
    return dict(doc_id=n, target=target, filtered_resps=text, token_counts=[None], doc_hash="0", input=asked, **kept)


def write_log(folder, b, made, form, shuffle=None):
    "A log per split; the paths."
    folder.mkdir(parents=True, exist_ok=True); paths = []
    splits, texts = made[b]
    for s, rows in splits.items():
        task = ("realign_" if form == "ours" else "") + ("hallusion_bench_" + s if b == "hallusionbench" else FIRST[b])
        lines = [line(b, r, texts[s, n], n, form) for n, r in enumerate(rows)]
        if shuffle is not None: random.Random(shuffle).shuffle(lines)
        paths.append(folder / f"20261101_120000_samples_{task}.jsonl")
        paths[-1].write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return paths


def direct(b, made, items):
    "Predictions that never saw a log."
    splits, texts = made[b]
    keys = dict(mmbench=["index"], hallusionbench=["category", "subcategory", "set_id", "figure_id", "question_id"], chair=["image_id"]).get(b, ["question_id"])
    return [{k: i[k] for k in keys} | dict(text=t.strip()) for i, t in zip(items, texts.values())]


def metrics(b, items, predictions): return score(b, items, predictions, RULES.get(b))


@pytest.mark.parametrize("form", ["old", "new", "ours"])
@pytest.mark.parametrize("b", SCORED)
def test_imported_score_is_the_direct_score(b, form, made, tmp_path):
    items = items_of(b, made[b][0])
    if b == "chair": items = [{k: v for k, v in i.items() if k != "truth_rule"} for i in items]      # pattern needs no word list of others
    write_log(tmp_path / form, b, made, form)
    needed = (b in BARE and form == "new") or b == "chair" or (b, form) == ("scienceqa", "old")
    if needed and b != "chair":
        with pytest.raises(ReadError, match="line 1: the log does not hold its questions"): lmms_samples(tmp_path / form)
    name, found, predictions = lmms_samples(tmp_path / form, b, items if needed else None)
    a, z = metrics(b, items, direct(b, made, items)), metrics(b, found, predictions)
    assert name == b and a["metrics"] == z["metrics"] and a["n"] == z["n"] and not (z["missing"] or z["unmatched"] or z["duplicate"])
    assert any(v not in (None, 0, 1, 100, 200, 2000, 800) for v in a["metrics"].values())        # neither all right nor all wrong
    if form == "ours" or needed: assert (a["intervals"], a["data_sha256"]) == (z["intervals"], z["data_sha256"])      # with the pictures' names, also the units
    if not needed or b == "chair": again = lmms_samples(tmp_path / form, b, items); assert metrics(b, *again[1:])["metrics"] == a["metrics"]  # the official items fit, too


@pytest.mark.parametrize("b", ["mmvet", "llavabench"])
@pytest.mark.parametrize("form", ["old", "new", "ours"])
def test_answers_for_a_judge(b, form, made, tmp_path):
    items = items_of(b, made[b][0])
    write_log(tmp_path, b, made, form)
    for given in (None, items):
        name, found, predictions = lmms_samples(tmp_path, items=given)
        assert name == b and len(found) == len(predictions) == 12 and {p["text"] for p in predictions} == {t.strip() for t in made[b][1].values()}
        assert all(p["question_id"] == i["question_id"] for p, i in zip(predictions, found))
        if given or form == "ours": assert [i["question_id"] for i in found] == [i["question_id"] for i in items]


@pytest.mark.parametrize("b", SCORED)
def test_order_and_shards_change_nothing(b, made, tmp_path):
    items = items_of(b, made[b][0]) if b in (*BARE, "chair") else None
    if b == "chair": items = [{k: v for k, v in i.items() if k != "truth_rule"} for i in items]
    whole = write_log(tmp_path / "a", b, made, "new")
    expect = lmms_samples(whole, items=items)
    assert lmms_samples(write_log(tmp_path / "b", b, made, "new", shuffle=3), items=items) == expect
    shards = []
    for f in whole:
        for k in range(2):
            part = tmp_path / f"rank{k}" / f.name; part.parent.mkdir(exist_ok=True); shards.append(part)
            part.write_text("".join(f.read_text().splitlines(keepends=True)[k::2]))
    assert lmms_samples(shards[::-1], items=items) == expect
    with pytest.raises(ReadError, match="holds 4 logs of"): lmms_samples(tmp_path, b, items)


def test_lines_that_come_twice_are_counted(made, tmp_path):
    f, = write_log(tmp_path, "mme", made, "ours")
    lines = f.read_text().splitlines(keepends=True)
    f.write_text("".join(lines + lines[:2]))
    _, items, predictions = lmms_samples(f)
    s = score("mme", items, predictions)
    assert (len(items), s["duplicate"], s["missing"]) == (28, 2, 0)
    other = json.loads(lines[0]); other["realign"]["question"] = "Another?"
    f.write_text("".join(lines) + json.dumps(other) + "\n")
    with pytest.raises(ReadError, match="line 29: another question in row 0 than .*line 1"): lmms_samples(f)


def test_parts_of_a_benchmark(made, tmp_path):
    "POPE's three tasks know their category; an image-only log is scored on images."
    items, (rows, texts) = items_of("pope", made["pope"][0]), (made["pope"][0]["test"], made["pope"][1])
    for task, category in (("pope_adv", "adversarial"), ("pope_pop", "popular"), ("pope_random", "random")):
        mine = [(r, texts["test", n]) for n, r in enumerate(rows) if r["category"] == category]
        lines = [line("pope", {k: v for k, v in r.items() if k != "category"}, t, n, "new") for n, (r, t) in enumerate(mine)]
        (tmp_path / f"1_samples_{task}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    _, found, predictions = lmms_samples(tmp_path, items=items[::-1])                         # by id: the order of the items does not matter
    assert score("pope", found, predictions)["metrics"] == score("pope", items, direct("pope", made, items))["metrics"]
    _, found, predictions = lmms_samples(tmp_path / "1_samples_pope_adv.jsonl", items=items)
    assert {i["category"] for i in found} == {"adversarial"} and score("pope", found, predictions)["missing"] == 0
    image, non_image = sorted(write_log(tmp_path / "hb", "hallusionbench", made, "new"))
    whole = lmms_samples([image, non_image])[1]
    assert (len(whole), len(lmms_samples(image)[1]), len(lmms_samples(image, items=whole)[1])) == (10, 8, 8)
    (tmp_path / "1_samples_pope.jsonl").write_text("{}\n")
    with pytest.raises(ReadError, match="pope and pope_adv and pope_pop and pope_random ask the same questions"): lmms_samples(tmp_path, "pope")


def test_verbose_answers_and_what_the_log_claims(made, tmp_path):
    "lmms-eval's POPE wants the bare word. Its own rule gives its number again, LLaVA's gives another."
    items = items_of("pope", made["pope"][0])
    _, _, predictions = lmms_samples(write_log(tmp_path, "pope", made, "new"), items=items)
    of = {r: score("pope", items, predictions, r) for r in ("lmms_eval", "llava")}
    mean = {r: sum(s["metrics"][f"{c}/accuracy"] for c in ("random", "popular", "adversarial"))/3 for r, s in of.items()}
    assert claimed_mean(predictions) == pytest.approx(mean["lmms_eval"]) == pytest.approx(1/3) and mean["llava"] == pytest.approx(2/3)
    assert of["lmms_eval"]["unparsable"] == 8 and of["llava"]["unparsable"] == 0
    _, items, predictions = lmms_samples(write_log(tmp_path / "s", "scienceqa", made, "new"), items=items_of("scienceqa", made["scienceqa"][0]))
    assert 100*claimed_mean(predictions) == pytest.approx(score("scienceqa", items, [p | dict(text=p["text"].replace("The answer is ", "")) for p in predictions])["metrics"]["accuracy"])
    assert score("scienceqa", items, predictions, "lenient")["metrics"]["accuracy"] > 100*claimed_mean(predictions)
    assert claimed_mean(lmms_samples(write_log(tmp_path / "o", "pope", made, "ours"))[2]) is None


@pytest.mark.parametrize("b", ALL)
def test_predict_only_leaves_nothing_but_rows(b, made, tmp_path):
    "The questions come from the data set, and every line is compared with its row."
    items, target = items_of(b, made[b][0]), dict(hallusionbench="gt_answer_details", llavabench="gpt_answer", chair="gt_object", textvqa="none", vizwiz="none").get(b, "answer")
    rows = {s: rows for s, rows in made[b][0].items()}
    for (s, of), f in zip(rows.items(), write_log(tmp_path, b, made, "new")):
        kept = ("doc_id", "target", "filtered_resps", "token_counts", "doc_hash", "input")
        lines = [{k: v for k, v in json.loads(x).items() if k in kept} | dict(bypass=[[""], ["yes"]]) for x in f.read_text().splitlines()]
        f.write_text("".join(json.dumps(x | dict(target=x["target"] if b == "scienceqa" else str(r.get(target, "answer")))) + "\n" for x, r in zip(lines, of)))
    with pytest.raises(ReadError, match="line 1: the log does not hold its questions"): lmms_samples(tmp_path)
    _, found, predictions = lmms_samples(tmp_path, items=items)
    expect = direct(b, made, items)
    assert found == items and [{k: v for k, v in p.items() if k in q} for p, q in zip(sorted(predictions, key=str), sorted(expect, key=str))] == sorted(expect, key=str)
    with pytest.raises(ReadError, match="but row . of the items asks"): lmms_samples(tmp_path, items=items[1:] + items[:1])


def test_a_row_that_does_not_agree_stops_the_import(made, tmp_path):
    for b in ("pope", "scienceqa"):
        items, f = items_of(b, made[b][0]), write_log(tmp_path, b, made, "new")
        for wrong in (items[1:] + items[:1], items[:3]):
            with pytest.raises(ReadError, match=r"samples_\w+.jsonl, line \d+: (asks|doc_id 3 is no row of the 3 items)"): lmms_samples(f, items=wrong)
        flipped = [dict(i) for i in items]; flipped[2] |= dict(label="no" if items[2].get("label") == "yes" else "yes") if b == "pope" else dict(answer=1 - min(1, items[2]["answer"]))
        with pytest.raises(ReadError, match="line 3: asks .* but row 2 of the items"): lmms_samples(f, items=flipped)


def test_questions_that_are_not_among_the_items_are_counted(made, tmp_path):
    items = items_of("textvqa", made["textvqa"][0])
    _, found, predictions = lmms_samples(write_log(tmp_path, "textvqa", made, "new"), items=items[:-2])
    s = score("textvqa", found, predictions)
    assert (s["n"], s["missing"], s["unmatched"]) == (10, 0, 2)


BROKEN = {  # what is done to line 2 -> words of the message
    "cut": (lambda x: json.dumps(x)[:40], "line 2: not JSON"),
    "no object": (lambda x: "[1]", "line 2: is '[1]'; a record"),
    "no id": (lambda x: json.dumps({k: v for k, v in x.items() if k != "doc_id"}), "line 2: field 'doc_id' is missing"),
    "id": (lambda x: json.dumps(x | dict(doc_id="one")), "field 'doc_id' is 'one', not a whole number"),
    "no answer": (lambda x: json.dumps({k: v for k, v in x.items() if k != "filtered_resps"}), "line 2: field 'resps' is missing"),
    "many": (lambda x: json.dumps(x | dict(filtered_resps=["yes", "no"])), "line 2: field 'filtered_resps' holds 2 answers"),
    "number": (lambda x: json.dumps(x | dict(filtered_resps=3)), "line 2: field 'filtered_resps' is '3', not a text"),
    "no question": (lambda x: json.dumps(x | dict(realign=dict(question_id="1"))), "line 2: the question has no 'category'"),
    "bare": (lambda x: json.dumps({k: v for k, v in x.items() if k != "realign"}), "line 2: the log does not hold its questions")}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_lines(how, made, tmp_path):
    change, words = BROKEN[how]
    f, = write_log(tmp_path, "pope", made, "ours")
    lines = f.read_text().splitlines(); lines[1] = change(json.loads(lines[1])); f.write_text("\n".join(lines))
    with pytest.raises(ReadError) as e: lmms_samples(f)
    assert words in str(e.value) and f.name in str(e.value)


def test_wrong_files(made, tmp_path):
    f, = write_log(tmp_path, "pope", made, "ours")
    with pytest.raises(ReadError, match="no such file or folder"): lmms_samples(tmp_path / "none")
    with pytest.raises(ReadError, match="holds no log ..._samples_TASK.jsonl of mme"): lmms_samples(tmp_path, "mme")
    with pytest.raises(ReadError, match="logs of mme and pope: one benchmark at a time"): lmms_samples(f, "mme")
    odd = f.rename(tmp_path / "1_samples_gqa.jsonl")
    with pytest.raises(ReadError, match="1_samples_gqa.jsonl: its task 'gqa' is none of pope, "): lmms_samples(odd)
    assert lmms_samples(odd, "pope")[0] == "pope"                                              # unless it is named
    with pytest.raises(ValueError, match="unknown benchmark 'gqa'"): lmms_samples(odd, "gqa")
    odd.write_text("")
    with pytest.raises(ReadError, match="holds no line"): lmms_samples(odd, "pope")


def test_reviews_in_the_log_are_judge_records(made, tmp_path):
    items = items_of("llavabench", made["llavabench"][0])
    f, = write_log(tmp_path, "llavabench", made, "new")
    lines = [json.loads(x) for x in f.read_text().splitlines()]
    lines[3]["gpt_eval_llava_all"] |= dict(review="error: time-out", scores=[-1, -1])
    lines[4]["gpt_eval_llava_all"] |= dict(review="Failed to Get a Proper Review.", scores=[-1, -1], eval_model="Failed Request")
    f.write_text("".join(json.dumps(x) + "\n" for x in lines))
    for given in (None, items):
        found = lmms_judgements(f, items=given); s = score("llavabench", given or lmms_samples(f)[1], found)
        assert (s["judge"], s["unjudged"], s["missing"]) == ("judge-1", 2, 0) and all("failed" in r for r in found if r["reply"] is None)
        kept = [n for n in range(12) if n not in (3, 4)]
        assert s["metrics"]["all"] == pytest.approx(round(100 * round(sum(n % 5 + 1 for n in kept)/10, 3) / round(sum(5 + n % 5 for n in kept)/10, 3), 1))
    assert [r["question_id"] for r in found] == [i["question_id"] for i in items]
    with pytest.raises(ReadError, match="never holds the judge's words"): lmms_judgements(write_log(tmp_path / "m", "mmvet", made, "new"))
    with pytest.raises(ReadError, match="pope has no judge"): lmms_judgements(write_log(tmp_path / "p", "pope", made, "new"))
    with pytest.raises(ReadError, match="no judge's reply here .*realign-eval judge llavabench"): lmms_judgements(write_log(tmp_path / "l", "llavabench", made, "ours"))


def test_hallusionbench_replies(made, tmp_path):
    "From the files beside the run, and from the log; a bare `unclear` may be a failed call."
    items = items_of("hallusionbench", made["hallusionbench"][0]); folder = tmp_path / "gpt_response"; folder.mkdir()
    reply = lambda n: ("Correct", "incorrect", "unclear", "The answer is unclear to me")[n % 4]
    rows = [{k: v for k, v in i.items() if k != "image"} | dict(model_prediction="Yes", gpt4v_output_gpt_check="1", gpt_answer=f"Judge this.\nOutput: none\nOutput:{reply(n)}") for n, i in enumerate(items)]
    for kind in ("VD", "VS"): (folder / f"hallusion_output_{kind.lower()}_model.json").write_text(json.dumps([r for r in rows if r["category"] == kind]))
    log = tmp_path / "1_samples_hallusion_bench_image.jsonl"
    log.write_text("".join(json.dumps(dict(doc_id=n, filtered_resps="Yes", target="", input=r["question"], aAcc=r)) + "\n" for n, r in enumerate(rows)))
    by = lambda rs: sorted(rs, key=lambda r: json.dumps({k: v for k, v in r.items() if k not in ("reply", "run", "judge", "failed")}))
    found = lmms_judgements(folder, items=items)
    assert by(found) == by(lmms_judgements(log)) == by(lmms_judgements(folder)) and {r["judge"] for r in found} == {None}
    s = score("hallusionbench", items, found)
    assert (s["n"], s["unjudged"], s["judge"]) == (10, 2, None) and [r["failed"] for r in found if r["reply"] is None] == ["unclear, which lmms-eval also writes when a call fails"] * 2
    rows[0].pop("gpt_answer"); (folder / "hallusion_output_vd_model.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(ReadError, match="record 1: no judge's reply here"): lmms_judgements(folder / "hallusion_output_vd_model.json")


def load(f):
    "A task file with its functions, as lmms-eval's loader finds them."
    def function(loader, node):
        module, name = loader.construct_scalar(node).split(".")
        spec = importlib.util.spec_from_file_location(module, f.parent / f"{module}.py"); m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
        return getattr(m, name)
    class Loader(yaml.FullLoader): pass
    Loader.add_constructor("!function", function)
    return yaml.load(f.read_text(encoding="utf-8"), Loader)


def test_tasks_ask_the_papers_questions_and_log_them(made, tmp_path):
    names = write_tasks(tmp_path / "tasks")
    assert names == [f"realign_{t}" for t in SOURCES] and {p.stem for p in (tmp_path / "tasks").glob("*.yaml")} == set(names)
    assert "import" not in (tmp_path / "tasks" / "realign_tasks.py").read_text()               # stands on its own
    for b, (splits, texts) in made.items():
        items, logs = iter(items_of(b, splits)), tmp_path / b
        logs.mkdir()
        for s, rows in splits.items():
            task = "hallusion_bench_" + s if b == "hallusionbench" else FIRST[b]; t = load(tmp_path / "tasks" / f"realign_{task}.yaml")
            assert t["generation_kwargs"]["max_new_tokens"] == MAX_NEW_TOKENS[b] and t["generation_kwargs"]["until"] == [] and t["test_split"] in (s, "test", "val")
            with open(logs / f"9_samples_realign_{task}.jsonl", "w") as f:
                for n, r in enumerate(rows):
                    i, asked = next(items), t["doc_to_text"](r, lmms_eval_specific_kwargs=t["lmms_eval_specific_kwargs"]["default"])
                    assert asked == prompt(b, i) and len(t["doc_to_visual"](r)) == (i["image"] is not None)
                    f.write(json.dumps(dict(doc_id=n, target=t["doc_to_target"](r), input=asked, filtered_resps=texts[s, n], **t["process_results"](r, [texts[s, n]]))) + "\n")
        _, found, predictions = lmms_samples(logs)
        assert len(found) == len(predictions) == world.COUNTS[b] and [i.get("image") is None for i in found] == [i["image"] is None for i in items_of(b, splits)]
    assert write_tasks(tmp_path / "two", ["mmvet", "pope"], owner="lmms-lab") == ["realign_pope", "realign_mmvet"]
    assert "dataset_path: lmms-lab/MMVet" in (tmp_path / "two" / "realign_mmvet.yaml").read_text()


def test_command_line():
    words = command_line("my tasks", ["realign_pope", "realign_scienceqa"], out="logs")
    assert "--include_path 'my tasks' --tasks realign_pope,realign_scienceqa" in words and "--log_samples --process_with_media --output_path logs" in words and "predict_only" not in words
    assert "media" not in command_line("t", ["realign_pope"])
