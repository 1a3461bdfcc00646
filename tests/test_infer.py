"""Every benchmark from its official files through a model to a score; crashes, shards, servers and bad pictures."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

import official_world as world
from faults import FaultServer
from realign_nb.bench import score
from realign_nb.core import RunMismatch, read_jsonl
from realign_nb.infer import answer, choose, join_parts, local_device, open_folder, predict_items, read_parts, this_shard
from realign_nb.join import find_benchmark, find_key, join_id
from realign_nb.models import ReplayVLM, load_vlm
from realign_nb.readers import MAX_NEW_TOKENS, prompt, read_items
from realign_nb.servers import text_hash
from realign_nb.world import draw

ALL = list(world.WRITERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory): return world.write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def items(folders): return {b: read_items(b, f) for b, f in folders.items()}


@pytest.fixture(scope="module")
def tiny(): return load_vlm("tiny")


class Scripted:
    "Answers with a function of the prompt and whether it sees a picture; stops when told."
    name, batch_size = "scripted", 4

    def __init__(self, say=lambda prompt, image: f"{len(prompt)} {image is not None}", stop=None): self.say, self.stop, self.calls, self.asked = say, stop, [], []

    def generate(self, prompts, images, max_new_tokens=64):
        if self.stop is not None and len(self.calls) == self.stop: self.stop = None; raise KeyboardInterrupt
        self.calls.append(list(prompts)); self.asked += list(zip(prompts, images))
        return [self.say(p, im) for p, im in zip(prompts, images)]


def texts(b, items, records): return {join_id(r, find_key(b, items, records)[0]): r["text"] for r in records}


@pytest.mark.parametrize("b", ALL)
def test_end_to_end_with_the_tiny_model(b, items, tiny, tmp_path):
    "Reader, prompt, model, parser and score; judged benchmarks up to the judge."
    said, missed = predict_items(b, items[b], tiny, tmp_path / b, max_new_tokens=4 if b not in ("chair", "mmvet", "llavabench") else 12)
    assert len(said) == world.COUNTS[b] and not missed and all(isinstance(p["text"], str) and p["model"] == "tiny" for p in said)
    assert [p["prompt_hash"] for p in said] == [text_hash(prompt(b, i)) for i in items[b]]
    assert {json.dumps(p) for p in read_jsonl(tmp_path / b / "predictions.jsonl")} == {json.dumps(p) for p in said}
    settings = json.loads((tmp_path / b / "manifest.json").read_text())["settings"]
    assert (settings["benchmark"], settings["model"], settings["decoding"], settings["items"]) == (b, "tiny", "greedy", len(items[b]))
    if find_benchmark(b).judged:
        reply = dict(mmvet="0.5", llavabench="8 4", hallusionbench="correct")[b]
        key = find_key(b, items[b], [])[0]
        said = [{k: p[k] for k in key} | dict(reply=reply, run=0, judge="none") for p in said]
    s = score(b, items[b], said, "chair_pattern" if b == "chair" else None)
    assert (s["n"], s["missing"], s["unmatched"], s["duplicate"]) == (len(items[b]), 0, 0, 0) and s["metrics"]
    assert s["data_sha256"] == settings["data_sha256"]


RIGHT = {  # the answer that a perfect model gives to an item
    "pope": lambda i: i["label"].title(), "mme": lambda i: i["answer"], "scienceqa": lambda i: "ABCD"[i["answer"]], "mmbench": lambda i: i["answer"],
    "textvqa": lambda i: i["answers"][0], "vizwiz": lambda i: i["answers"][0]["answer"]}
BEST = dict(pope=("mean/accuracy", 1.), mme=("perception", 2000.), scienceqa=("accuracy", 100.), mmbench=("circular", 100.), textvqa=("accuracy", 100.), vizwiz=("accuracy", 100.))


@pytest.mark.parametrize("b", RIGHT)
def test_a_perfect_model_gets_the_maximum(b, items, tmp_path):
    "The truth in the files, the prompts and the scorer fit together: a model that knows its question by prompt and picture is right everywhere."
    look = lambda p, im: (p, im and im.tobytes())
    known = {look(prompt(b, i), i["image"] and i["image"].open()): RIGHT[b](i) for i in items[b]}
    said, _ = predict_items(b, items[b], Scripted(lambda p, im: known[look(p, im)]), tmp_path / b)
    name, best = BEST[b]
    metrics = score(b, items[b], said)["metrics"]
    assert next(v for k, v in metrics.items() if k == name) == pytest.approx(best), metrics


def test_questions_without_a_picture(items, tiny, tmp_path):
    "ScienceQA and HallusionBench: text where the benchmark has it so, pictures everywhere else."
    for b, bare in (("scienceqa", 6), ("hallusionbench", 2)):
        model = Scripted(); predict_items(b, items[b], model, tmp_path / b)
        assert sum(im is None for _, im in model.asked) == bare
        assert {p for p, im in model.asked if im is None} == {prompt(b, i) for i in items[b] if i["image"] is None}
    questions = ["Where is the cat?", "What is it? " * 20]
    picture = draw(world.SCENES[0])
    bare = tiny.generate(questions, [None] * 2, 8)
    assert bare == [tiny.generate([q], [None], 8)[0] for q in questions] != tiny.generate(questions, [picture] * 2, 8)
    assert answer(tiny, [*questions, *questions], [None, picture, picture, None], 8) == [bare[0], *tiny.generate(questions[::-1], [picture] * 2, 8), bare[1]]


def test_replay_has_no_text_only(tmp_path):
    (tmp_path / "calls.jsonl").write_text(json.dumps(dict(stage="s", model="m", settings=dict(max_new_tokens=8), replies=[dict(key="k", prompt="p", image="i", text="t", tokens=None, reason=None, failed=False)])) + "\n")
    with pytest.raises(ValueError, match="recorded answers are found by their picture, and 'x' has none"): answer(ReplayVLM(tmp_path / "calls.jsonl"), ["x"], [None], 8)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_killed_run_goes_on(stop, items, tmp_path):
    "Same batches, same answers, nothing asked twice but the batch that was under way; a torn last line is done again."
    pope, whole = items["pope"], Scripted()
    expected, _ = predict_items("pope", pope, whole, tmp_path / "whole")
    model = Scripted(stop=stop)
    with pytest.raises(KeyboardInterrupt): predict_items("pope", pope, model, tmp_path / "r")
    file = tmp_path / "r" / "predictions.jsonl"
    if stop:
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.warns(UserWarning, match="dropped a torn last line"): said, _ = predict_items("pope", pope, model, tmp_path / "r")
    else: said, _ = predict_items("pope", pope, model, tmp_path / "r")
    assert said == expected and len(read_jsonl(file)) == 24
    assert set(map(tuple, model.calls)) == set(map(tuple, whole.calls)) and len(model.calls) == len(whole.calls) + bool(stop)
    predict_items("pope", pope, model, tmp_path / "r")
    assert len(model.calls) == len(whole.calls) + bool(stop)


def test_other_settings_are_refused_by_name(items, tiny, tmp_path):
    pope, text = items["pope"], items["textvqa"]
    predict_items("pope", pope, Scripted(), tmp_path / "p", limit=2); predict_items("textvqa", text, Scripted(), tmp_path / "t", limit=1)
    other = Scripted(); other.name = "another"
    for call, says in [(lambda: predict_items("pope", pope, other, tmp_path / "p"), "model: 'scripted' there, 'another' now"),
                       (lambda: predict_items("pope", pope, Scripted(), tmp_path / "p", max_new_tokens=9), "max_new_tokens: 128 there, 9 now"),
                       (lambda: predict_items("pope", pope[1:], Scripted(), tmp_path / "p"), "items: 24 there, 23 now"),
                       (lambda: predict_items("textvqa", text, Scripted(), tmp_path / "t", ocr=False), "prompt: 'llava/textvqa_ocr' there, 'llava/textvqa_no_ocr' now"),
                       (lambda: predict_items("pope", pope, tiny, tmp_path / "p"), f"weights: None there, {tiny.fingerprint!r} now")]:
        with pytest.raises(RunMismatch) as e: call()
        assert says in str(e.value)
    said, _ = predict_items("pope", pope, Scripted(), tmp_path / "p", batch_size=1)                  # how it is cut does not matter
    assert len(said) == 24


def test_limit_and_ids(items, tmp_path):
    pope = items["pope"]; model = Scripted()
    first, _ = predict_items("pope", pope, model, tmp_path / "p", limit=5)
    some, _ = predict_items("pope", pope, model, tmp_path / "p", ids=[pope[7]["question_id"], pope[2]["question_id"]])
    assert [p["question_id"] for p in first] == [i["question_id"] for i in pope[:5]] and [p["question_id"] for p in some] == [pope[n]["question_id"] for n in (2, 7)]
    assert len(read_jsonl(tmp_path / "p" / "predictions.jsonl")) == 6 and len(model.asked) == 7     # a batch is asked as a whole
    predict_items("pope", pope, model, tmp_path / "p")
    assert len(read_jsonl(tmp_path / "p" / "predictions.jsonl")) == 24 and len(model.asked) <= 7 + 18 + 3
    for bad, says in ((dict(ids=["x"]), "no item has the id 'x'"), (dict(limit=0), "at least one question")):
        with pytest.raises(ValueError, match=says): predict_items("pope", pope, model, tmp_path / "p", **bad)
    assert choose(["a", "b"], 5) == ["a", "b"]


def test_bad_pictures_are_misses(folders, tmp_path):
    "A damaged, a missing and an unnamed picture; repaired, they are asked at the next start."
    root = world.write_all(tmp_path, ["mmvet"])["mmvet"]
    good = (root / "images" / "v1_0.png").read_bytes()
    (root / "images" / "v1_0.png").write_bytes(good[:40]); (root / "images" / "v1_1.png").rename(root / "images" / "away.png")
    items = read_items("mmvet", root); items[2]["image"] = None
    model = Scripted(); run = lambda: predict_items("mmvet", items, model, tmp_path / "run")
    said, missed = run()
    why = {m["question_id"]: m["reason"] for m in missed}
    assert len(said) == 5 and len(missed) == 7 and all(im is not None for _, im in model.asked)
    assert "not a readable image" in why["v1_0"] and "no such file in" in why["v1_1"] and "names no picture" in why["v1_2"]
    asked = len(model.asked); run()
    assert len(model.asked) == asked and len(read_jsonl(tmp_path / "run" / "misses.jsonl")) == 7     # tried again, listed once
    (root / "images" / "v1_0.png").write_bytes(good); (root / "images" / "away.png").rename(root / "images" / "v1_1.png")
    said, missed = run()
    assert len(said) == 11 and [m["question_id"] for m in missed] == ["v1_2"]


@pytest.mark.parametrize("n", [2, 5, 40])
def test_shards_make_the_whole(n, items, tmp_path):
    "In any order of finishing; more shards than questions too."
    pope = items["pope"]; expected = texts("pope", pope, predict_items("pope", pope, Scripted(), tmp_path / "whole")[0])
    parts = [predict_items("pope", pope, Scripted(), tmp_path / "r", shard=(i, n))[0] for i in np.random.default_rng(n).permutation(n)]
    assert sum(map(len, parts)) == 24
    whole = read_jsonl(tmp_path / "r" / "predictions.jsonl")
    assert texts("pope", pope, whole) == expected and len(whole) == 24
    a, b = score("pope", pope, whole), score("pope", pope, [dict(question_id=k, text=t) for k, t in expected.items()])
    assert (a["metrics"], a["intervals"]) == (b["metrics"], b["intervals"])
    model = Scripted(); predict_items("pope", pope, model, tmp_path / "r")                          # one process afterwards finds all done
    assert not model.asked


def test_the_number_of_shards_may_change(items, tmp_path):
    "What is known is not asked again although the batches are others."
    pope, first, then = items["pope"], Scripted(stop=4), Scripted()
    for i in range(2):
        with suppress(KeyboardInterrupt): predict_items("pope", pope, first, tmp_path / "r", shard=(i, 2))
    assert len(first.asked) == 16
    for i in range(3): predict_items("pope", pope, then, tmp_path / "r", shard=(i, 3))
    assert len(read_jsonl(tmp_path / "r" / "predictions.jsonl")) == 24 and len(then.asked) <= 8 + 3


def test_a_line_that_is_being_written_is_left_alone(tmp_path):
    run = open_folder(tmp_path / "r", dict(a=1))
    run.append("predictions-0-of-2", dict(question_id=1, text="a"))
    half = '{"question_id": 2, "te'
    with open(run / "predictions-1-of-2.jsonl", "w") as f: f.write(half)
    assert read_parts(run.path) == join_parts(run.path, ("question_id",)) == [dict(question_id=1, text="a")]
    assert (run / "predictions-1-of-2.jsonl").read_text() == half


def test_one_folder_for_many_starts(tmp_path):
    "Twenty starts at once make one run; other settings and foreign folders are refused; nothing is left beside."
    with ThreadPoolExecutor(20) as pool: runs = list(pool.map(lambda n: open_folder(tmp_path / "sub" / "r", dict(a=1)), range(20)))
    assert {r.settings["a"] for r in runs} == {1} and [p.name for p in (tmp_path / "sub").iterdir()] == ["r"]
    with pytest.raises(RunMismatch, match="a: 1 there, 2 now"): open_folder(tmp_path / "sub" / "r", dict(a=2))
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "x.txt").touch()
    with pytest.raises(RunMismatch, match="is not empty and not a run"): open_folder(tmp_path / "mine", dict(a=1))
    (tmp_path / "file").touch()
    with pytest.raises(RunMismatch, match="is a file"): open_folder(tmp_path / "file", dict(a=1))


def test_two_processes_as_accelerate_starts_them(items, folders, tmp_path):
    "RANK and WORLD_SIZE in the environment; both at once; whoever is last joins the files."
    code = ("import sys, time; from realign_nb.infer import predict_items; from realign_nb.readers import read_items\n"
            "class M:\n  name, batch_size = 'm', 3\n  def generate(self, prompts, images, n): time.sleep(.02); return [p[:30] for p in prompts]\n"
            "predict_items('mme', read_items('mme', sys.argv[1]), M(), sys.argv[2])")
    start = lambda i: subprocess.Popen([sys.executable, "-c", code, folders["mme"], tmp_path / "r"], env=dict(os.environ, WORLD_SIZE="2", RANK=str(i)), stderr=subprocess.PIPE, text=True)
    for p in [start(i) for i in range(2)]: assert p.wait(60) == 0, p.stderr.read()
    whole = read_jsonl(tmp_path / "r" / "predictions.jsonl")
    assert texts("mme", items["mme"], whole) == {i["question_id"]: prompt("mme", i)[:30] for i in items["mme"]} and len(whole) == 28
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["manifest.json", "predictions-0-of-2.jsonl", "predictions-1-of-2.jsonl", "predictions.jsonl"]


def test_shards_of_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "3"); monkeypatch.setenv("WORLD_SIZE", "4")
    assert this_shard() == (3, 4) and this_shard((0, 2)) == (0, 2)
    import torch
    monkeypatch.setenv("LOCAL_RANK", "3")
    for there, device in ((0, None), (2, "cuda:1"), (8, "cuda:3")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0); monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
        assert local_device() == device
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="shard 3 of 3"): this_shard()


class TextServer(FaultServer):
    "Takes questions without a picture too, and says what it saw."
    seen, plan = (), ()

    def fault(self, question):
        fault, self.plan = (self.plan[0], self.plan[1:]) if self.plan else (None, ())
        return fault

    async def _chat(self, body, reader, writer):
        kinds = [c["type"] for c in body["messages"][-1]["content"]]
        self.seen = (*self.seen, (next(c["text"] for c in body["messages"][-1]["content"] if c["type"] == "text"), "image_url" in kinds))
        if "image_url" in kinds: return await super()._chat(body, reader, writer)
        self._send(writer, 200, self._complete(body, self.seen[-1][0], b"")); await writer.drain()
        return True


def test_servers(items, tmp_path):
    "Text-only questions are sent without a picture; what fails is missed and asked again; what is cut off or refused is an answer with a note."
    sqa = items["scienceqa"]
    with TextServer() as server:
        server.plan = ("server_error", "length", "refusal") * 2
        vlm = load_vlm(f"server:tiny@{server.url}"); vlm.max_retries = 0
        said, missed = predict_items("scienceqa", sqa, vlm, tmp_path / "r")
        shown = {prompt("scienceqa", i): i["image"] is not None for i in sqa}
        assert all(shown[q] == seen for q, seen in server.seen) and len(server.seen) == 12
        assert [m["reason"].split(",")[0] for m in missed] == ["server error: HTTP 500"] * 2 and len(said) == 10
        assert sorted(p["note"].split(":")[0] for p in said if "note" in p) == ["refused"] * 2 + ["truncated"] * 2 and all(p["text"] for p in said)
        again, missed = predict_items("scienceqa", sqa, vlm, tmp_path / "r")
        assert len(again) == 12 and not missed and len(server.seen) == 12 + 12 - len(said)
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["settings"]["server"] == dict(temperature=0., max_side=1024)


def test_an_adapter_is_another_run(items, tiny, tmp_path):
    "Two adapters of one name in different places are told apart by their weights."
    from peft import LoraConfig, get_peft_model
    import torch
    runs = {}
    for n in range(2):
        base = load_vlm("tiny"); torch.manual_seed(n)
        model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)); model.save_pretrained(tmp_path / str(n) / "adapter")
        runs[n] = load_vlm("tiny", adapter=tmp_path / str(n) / "adapter")
    predict_items("mme", items["mme"], runs[0], tmp_path / "r", limit=2, max_new_tokens=2)
    settings = json.loads((tmp_path / "r" / "manifest.json").read_text())["settings"]
    assert settings["adapter"] == "adapter" and MAX_NEW_TOKENS["mme"] == 128
    with pytest.raises(RunMismatch, match="weights: "): predict_items("mme", items["mme"], runs[1], tmp_path / "r", limit=2, max_new_tokens=2)
    with pytest.raises(RunMismatch, match="adapter: 'adapter' there, None now"): predict_items("mme", items["mme"], tiny, tmp_path / "r", limit=2, max_new_tokens=2)
