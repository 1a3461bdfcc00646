"""The judge client against a scripted server on loopback: what fails is never a score, what was answered is never asked again."""
import hashlib, json, os, signal, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from realign_nb.bench import score
from realign_nb.core import RunMismatch, read_jsonl
from realign_nb.engine import BudgetReached
from realign_nb.judges import judge
from realign_nb.servers import StopAsking
from realign_nb.templates import HALLUSION, HALLUSION_SAME, LLAVABENCH, MMVET, TEMPLATES, read_template, requests

OPEN = "\n\n"                                                                              # MM-Vet's open row stands after the last empty line




class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_POST(self):
        s, body = self.server.judge, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock: s.seen.append(body); n = len(s.seen)
        what = s.say(body, n)
        if what == "stall": s.over.wait(20); self.close_connection = True; return
        if what == "hang up": self.close_connection = True; return
        status, text = what if isinstance(what, tuple) else (200, what)
        message = dict(role="assistant", content=text, refusal=None)
        usage = dict(prompt_tokens=len(json.dumps(body["messages"])) // 4, completion_tokens=3, total_tokens=0) if s.usage else None
        data = json.dumps(dict(id="1", object="chat.completion", created=0, model=s.name, usage=usage, choices=[dict(index=0, message=message, finish_reason="length")])).encode()
        if text == "not json": data = b"<html>busy</html>"
        with s.lock: s.answered += status == 200
        self.send_response(status); self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)


class Scripted:
    "`say(body, number of the request)` gives a text, (status, text), 'stall' or 'hang up'."
    def __init__(self, say, name="judge-a-2026-11-01", usage=True):
        self.say, self.name, self.usage, self.seen, self.answered, self.lock, self.over = say, name, usage, [], 0, threading.Lock(), threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler); self.server.judge, self.server.daemon_threads = self, True
        self.how = dict(model="judge-a", base_url=f"http://127.0.0.1:{self.server.server_port}/v1", max_retries=0, timeout=20.)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *args): self.over.set(); self.server.shutdown(); self.server.server_close()

    def requests(self): return Counter((b["messages"][-1]["content"], b.get("temperature")) for b in self.seen)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"): monkeypatch.delenv(name, raising=False)


def vet(n): return [dict(question_id=f"v1_{k}", question=f"What is {k}?", answer=f"{k}<AND>one", capability=["rec"]) for k in range(n)]
def answers(items, text="It is {}."): return [dict(question_id=i["question_id"], text=text.format(n)) for n, i in enumerate(items)]
def number(body): return int(body["messages"][-1]["content"].split(OPEN)[-1].split("?")[0].split()[-1])


# ---- what goes wrong at the server

def test_failing_stalling_refusing_and_rambling_give_no_score_and_are_asked_again_or_not(tmp_path):
    "One question per misfortune; 0 and 9 are judged well."
    script = {0: "0.5", 1: (500, ""), 2: "stall", 3: "nan", 4: "", 5: "The prediction is right.", 6: "hang up", 7: (200, "not json"), 8: "I'm sorry, but I can't assist with that.", 9: "1.0"}
    items = vet(10)
    with Scripted(lambda body, n: script[number(body)]) as s:
        how = s.how | dict(timeout=2.5)
        first = judge("mmvet", items, answers(items), tmp_path / "a", **how)
        assert first["unjudged"] == {"server error": 1, "time-out": 1, "unreadable": 3, "no connection": 1, "broken reply": 1, "refused": 1} and first["judged"] == 2
        asked = Counter(number(b) for b in s.seen)
        assert asked == {0: 1, 1: 1, 2: 1, 6: 1, 7: 1, 9: 1, 3: 5, 4: 5, 5: 5, 8: 5}       # what cannot be read, five times in all; a failing service, once per start
        nan = [b for b in s.seen if number(b) == 3]
        assert [b["temperature"] for b in nan] == [0, .5, 1, 1.5, 2] and [b["messages"][-1]["content"].endswith(MMVET.again) for b in nan] == [False] + [True] * 4
        assert all(b["max_tokens"] == 3 for b in s.seen)
        s.seen.clear(); script[2] = (500, "")
        second = judge("mmvet", items, answers(items), tmp_path / "a", **how)
        assert Counter(number(b) for b in s.seen) == {1: 1, 2: 1, 6: 1, 7: 1}              # only what the service failed on
        assert second["unjudged"] == {"server error": 2, "unreadable": 3, "no connection": 1, "broken reply": 1, "refused": 1}
        s.seen.clear(); script.update({1: "0.1", 2: "0.2", 6: "0.6", 7: "0.7"})
        third = judge("mmvet", items, answers(items), tmp_path / "a", **how)
        assert len(s.seen) == 4 and third["judged"] == 6 and third["unjudged"] == {"unreadable": 3, "refused": 1}
    assert {r["question_id"]: r["reply"] for r in third["records"] if r["reply"]} == {"v1_0": "0.5", "v1_1": "0.1", "v1_2": "0.2", "v1_6": "0.6", "v1_7": "0.7", "v1_9": "1.0"}
    assert read_jsonl(tmp_path / "a" / "judgements.jsonl") == third["records"]
    bad = [r for r in third["records"] if "failed" in r]
    assert all(r["reply"] is None and r["tries"] == 5 and r["failed"].endswith("(try 5 of 5)") for r in bad) and [r["said"] for r in bad] == ["nan", "", "The prediction is right.", script[8]]
    result = score("mmvet", items, third["records"])
    assert result["metrics"]["total"] == pytest.approx(100 * (.5 + .1 + .2 + .6 + .7 + 1) / 6) and result["unjudged"] == 4 and result["judge"] == "judge-a-2026-11-01"


def test_a_second_try_that_can_be_read_is_the_grade(tmp_path):
    items = vet(3)
    with Scripted(lambda body, n: "0.4" if body["temperature"] >= .5 else "about 0.4") as s:
        out = judge("mmvet", items, answers(items), tmp_path, **s.how)
    assert [(r["reply"], r["tries"]) for r in out["records"]] == [("0.4", 2)] * 3 and len(s.seen) == 6 and not out["unjudged"]


def test_more_tries_go_on_where_the_others_ended(tmp_path):
    items = vet(1)
    with Scripted(lambda body, n: "0.4" if n == 4 else "hm") as s:
        assert judge("mmvet", items, answers(items), tmp_path, **s.how, tries=2)["unjudged"] == {"unreadable": 1} and len(s.seen) == 2
        assert judge("mmvet", items, answers(items), tmp_path, **s.how, tries=2)["asked"] == 0
        assert judge("mmvet", items, answers(items), tmp_path, **s.how, tries=9)["records"][0]["reply"] == "0.4" and len(s.seen) == 4
        s.say = lambda body, n: "hm"
        judge("mmvet", items, answers(items, "It is new."), tmp_path, **s.how, tries=6)
        assert [b["temperature"] for b in s.seen[4:]] == [0, .5, 1, 1.5, 2, 2]             # no service takes more than 2


def test_a_dead_server_stops_the_run_and_nothing_is_lost(tmp_path):
    items = vet(12)
    with Scripted(lambda body, n: "0.5" if n <= 3 else (503, "")) as s:
        with pytest.raises(StopAsking, match="4 questions in a row failed"): judge("mmvet", items, answers(items), tmp_path, **s.how, give_up=4, concurrency=1)
        assert len(s.seen) == 7 and len([r for r in read_jsonl(tmp_path / "judgements.jsonl") if r["reply"]]) == 3
        s.say = lambda body, n: "0.5"
        assert judge("mmvet", items, answers(items), tmp_path, **s.how)["judged"] == 12 and len(s.seen) == 7 + 9


def test_another_model_under_the_same_address_is_no_judge(tmp_path):
    items = vet(2)
    with Scripted(lambda body, n: "1.0", name="somebody-else") as s:
        out = judge("mmvet", items, answers(items), tmp_path, **s.how)
    assert out["unjudged"] == {"wrong model": 2} and out["judge"] == [] and score("mmvet", items, out["records"])["metrics"]["total"] is None


# ---- nothing is asked twice

def test_permuted_and_grown_sets_ask_only_what_is_new(tmp_path):
    items = vet(9)
    with Scripted(lambda body, n: "0.5") as s:
        judge("mmvet", items[:4], answers(items)[:4], tmp_path, **s.how)
        more = judge("mmvet", items[::-1], answers(items)[3:] + answers(items)[:3], tmp_path, **s.how)
        assert len(s.seen) == 9 and max(s.requests().values()) == 1 and (more["asked"], more["reused"], more["judged"]) == (5, 4, 9)
        two = judge("mmvet", items, answers(items), tmp_path, **s.how, runs=2)
        assert len(s.seen) == 18 and two["judged"] == 18 and Counter(r["run"] for r in two["records"]) == {0: 9, 1: 9}   # a second run is asked anew, the first is not
        other = answers(items); other[0]["text"] = "It is something else."
        assert judge("mmvet", items, other, tmp_path, **s.how)["asked"] == 1 and len(s.seen) == 19     # never a grade of another answer


KILLED = """
import sys; from realign_nb.judges import judge
items = [dict(question_id=f"v1_{k}", question=f"What is {k}?", answer=f"{k}<AND>one", capability=["rec"]) for k in range(8)]
judge("mmvet", items, [dict(question_id=i["question_id"], text=f"It is {n}.") for n, i in enumerate(items)], sys.argv[1], "judge-a", sys.argv[2], max_retries=0, timeout=60., concurrency=1)
"""


def test_a_kill_loses_no_reply_and_repeats_no_call(tmp_path):
    items, folder = vet(8), tmp_path / "a"
    with Scripted(lambda body, n: "0.5" if n <= 5 else "stall") as s:
        p = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), s.how["base_url"]], env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while len(s.seen) < 6 and time.time() < deadline: time.sleep(.02)
        assert p.poll() is None and len(s.seen) == 6
        os.kill(p.pid, signal.SIGKILL); p.wait()
        assert not (folder / "judgements.jsonl").exists() and len(read_jsonl(folder / "calls.jsonl")) == 5
        with open(folder / "calls.jsonl", "a") as f: f.write('{"stage": "mmvet/run 0/try 0", "mod')     # a line that was being written
        s.say = lambda body, n: "0.5"
        with pytest.warns(UserWarning, match="torn last line"): out = judge("mmvet", items, answers(items), folder, **s.how)
        assert out["judged"] == 8 and (out["asked"], out["reused"]) == (3, 5) and s.answered == 8
        assert sorted(s.requests().values()) == [1] * 7 + [2]                              # the one that hung when the process was killed had no answer


def test_a_folder_of_another_judge_text_or_limit_is_refused(tmp_path):
    items = vet(1); own = tmp_path / "own.txt"; own.write_text("{question} {answer} {prediction}")
    with Scripted(lambda body, n: "0.5") as s:
        judge("mmvet", items, answers(items), tmp_path / "a", **s.how)
        for change in (dict(model="judge-b"), dict(prompt_file=str(own)), dict(max_tokens=9), dict(temperature=.7)):
            with pytest.raises(RunMismatch): judge("mmvet", items, answers(items), tmp_path / "a", **s.how | change)
        assert len(s.seen) == 1


# ---- replay, cost, budget

def test_a_replay_needs_no_network_and_invents_nothing(tmp_path):
    items = vet(4)
    with Scripted(lambda body, n: ["0.1", "nan", "0.3", "0.4"][number(body)]) as s: live = judge("mmvet", items, answers(items), tmp_path / "a", **s.how, runs=2)
    calls = str(tmp_path / "a" / "calls.jsonl")                                            # the server is gone now
    again = judge("mmvet", items, answers(items), tmp_path / "b", "judge-a", runs=2, replay=calls, base_url="http://127.0.0.1:9/v1")
    assert again["records"] == [r for r in live["records"]] and again["dollars"] == 0
    assert judge("mmvet", items, answers(items), tmp_path / "c", "judge-b", replay=calls)["unjudged"] == {"not recorded": 4}      # another judge said nothing
    many = vet(40)
    assert judge("mmvet", many, answers(many), tmp_path / "d", "judge-a", replay=calls)["unjudged"] == {"not recorded": 36, "unreadable": 1}
    with pytest.raises(ValueError, match="no such file; replay takes"): judge("mmvet", items, answers(items), tmp_path / "e", "judge-a", replay="nowhere.jsonl")


def test_a_dry_run_asks_nothing_writes_nothing_and_brackets_the_bill(tmp_path):
    items = vet(10); prices = dict(price_in=10., price_out=30.)
    with Scripted(lambda body, n: "0.5" if number(body) % 2 or body["temperature"] else "well,") as s:
        q = judge("mmvet", items, answers(items), tmp_path / "a", **s.how, runs=2, dry_run=True, **prices)
        assert not s.seen and not (tmp_path / "a").exists() and q["calls"] == (20, 100) and q["known"] == 0
        assert judge("mmvet", items, answers(items), tmp_path / "a", **s.how, dry_run=True)["dollars"] is None        # no price is not free
        out = judge("mmvet", items, answers(items), tmp_path / "a", **s.how, runs=2, **prices)
        assert q["calls"][0] <= len(s.seen) == 30 <= q["calls"][1] and q["dollars"][0] * .8 < out["dollars"] < q["dollars"][1]
        left = judge("mmvet", items, answers(items), tmp_path / "a", **s.how, runs=3, dry_run=True)
        assert left["calls"] == (10, 50) and left["known"] == 30


def test_the_budget_is_never_exceeded_and_the_next_one_goes_on(tmp_path):
    items = vet(30); prices = dict(price_in=10., price_out=30.)
    with Scripted(lambda body, n: "0.5") as s:
        with pytest.raises(BudgetReached): judge("mmvet", items, answers(items), tmp_path, **s.how, budget=.005, **prices)
        assert not s.seen                                                                  # not even the first: its bytes bound its tokens
        with pytest.raises(BudgetReached, match="of 30 answers are there and kept"): judge("mmvet", items, answers(items), tmp_path, **s.how, budget=.06, **prices)
        cost = sum(len(json.dumps(b["messages"])) // 4 * 10 + 3 * 30 for b in s.seen) / 1e6
        assert .03 < cost <= .06 and 0 < len(s.seen) < 30 and len(read_jsonl(tmp_path / "judgements.jsonl")) == len(s.seen)
        out = judge("mmvet", items, answers(items), tmp_path, **s.how, budget=9., **prices)
        assert out["judged"] == 30 and len(s.seen) == 30 and out["dollars"] == pytest.approx(sum(len(json.dumps(b["messages"])) // 4 * 10 + 90 for b in s.seen) / 1e6)
    with Scripted(lambda body, n: "0.5", usage=False) as s:
        with pytest.raises(StopAsking, match="how many tokens"): judge("mmvet", items, answers(items), tmp_path / "b", **s.how, budget=9., concurrency=1, **prices)
        assert len(s.seen) <= 2


# ---- the other benchmarks

def test_llavabench_is_sent_in_its_parts_and_read_by_its_rule(tmp_path):
    items = [dict(question_id=n, image="1.jpg", text="What is it?", category=c, caption=["A cat.", "On a mat."], reference="A {question} cat.") for n, c in enumerate(("conv", "llava_bench_detail", "complex"))]
    said = dict(conv="8 7\nThe first ...", detail="The first gets 8", complex="9, 9")
    def say(body, n): return said[next(c for c, r in LLAVABENCH.rules.items() if body["messages"][-1]["content"].endswith(r))]
    with Scripted(say) as s:
        out = judge("llavabench", items, [dict(question_id=n, text="A {rule} dog.") for n in range(3)], tmp_path, **s.how, runs=2)
        body = s.seen[0]
        assert [m["role"] for m in body["messages"]] == ["system", "user"] and (body["temperature"], body["max_tokens"]) == (.2, 1024)
        text = body["messages"][1]["content"]
        marks = ["[Context]\nA cat.\nOn a mat.", "[Question]\nWhat is it?", "[Assistant 1]\nA {question} cat.", "[End of Assistant 1]", "[Assistant 2]\nA {rule} dog.", "[End of Assistant 2]", "[System]\n"]
        assert [text.index(m) for m in marks] == sorted(text.index(m) for m in marks)
        assert len(s.seen) == 2 * (1 + 3 + 3) and out["unjudged"] == {"unreadable": 4}
        before = len(s.seen)
        kind = judge("llavabench", items, [dict(question_id=n, text="A {rule} dog.") for n in range(3)], tmp_path / "lenient", **s.how, rule="lenient")
        assert len(s.seen) - before == 1 + 3 + 1 and [r["reply"] for r in kind["records"]] == ["8 7\nThe first ...", None, "9, 9"]
    result = score("llavabench", items, out["records"])
    assert result["metrics"] == dict(all=87.5, complex=None, conv=87.5, detail=None) and result["unjudged"] == 4 and result["runs"] == 2


def hallusion(figures=3): return [dict(category="VS", subcategory="chart", visual_input="0" if f == 0 else "1", set_id="0", figure_id=str(f), question_id="0", question="Is A above B?",
                                       gt_answer="1", gt_answer_details=f"In figure {f} A is above B.") for f in range(figures)]


def test_hallusionbench_takes_one_word_and_a_refusal_is_not_unclear(tmp_path):
    items = hallusion(4); key = ("category", "subcategory", "set_id", "figure_id", "question_id")
    predictions = [{k: i[k] for k in key} | dict(text=("I cannot know.", "Yes.", "Yes, it is.", "Yes.")[n]) for n, i in enumerate(items)]
    refusal = "I'm sorry, but I can't help with that."
    with Scripted(lambda body, n: refusal if "figure 0" in body["messages"][-1]["content"] else "Correct." if "figure 1" in body["messages"][-1]["content"] else "incorrect") as s:
        out = judge("hallusionbench", items, predictions, tmp_path / "a", **s.how)
        assert [r["reply"] for r in out["records"]] == [None, "Correct.", "incorrect", "incorrect"] and out["unjudged"] == {"refused": 1}   # officially the refusal is "unclear", and right at figure 0
        assert {k: out["records"][1][k] for k in key} == {k: items[1][k] for k in key}
        result = score("hallusionbench", items, out["records"])
        assert result["unjudged"] == 1 and result["judge"] == "judge-a-2026-11-01" and result["missing"] == 0
        s.seen.clear(); s.say = lambda body, n: "different"
        same = judge("hallusionbench_same", items, predictions, tmp_path / "same", **s.how)
        assert len(s.seen) == 2 and [r["reply"] for r in same["records"]] == ["different"] * 3 and "First answer: I cannot know." in s.seen[0]["messages"][-1]["content"]   # equal questions are asked once


# ---- templates

def test_every_record_names_judge_day_and_text(tmp_path):
    items = vet(1)
    with Scripted(lambda body, n: "0.5") as s: r = judge("mmvet", items, answers(items), tmp_path, **s.how)["records"][0]
    assert (r["judge"], r["asked"], r["template"], r["template_sha256"]) == ("judge-a-2026-11-01", "judge-a", "realign-mmvet-1", MMVET.sha256)
    assert len(r["date"]) == 10 and r["prompt_sha256"] == hashlib.sha256(s.seen[0]["messages"][-1]["content"].encode()).hexdigest()


def test_judges_that_think_first_can_be_asked(tmp_path):
    items = vet(1)
    with Scripted(lambda body, n: "0.5") as s: judge("mmvet", items, answers(items), tmp_path, **s.how, max_tokens=800, limit_name="max_completion_tokens", temperature=-1.)
    assert s.seen[0]["max_completion_tokens"] == 800 and not {"max_tokens", "temperature"} & {*s.seen[0]}


def test_the_judge_has_no_default_and_other_texts_are_checked(tmp_path):
    with pytest.raises(TypeError, match="model"): judge("mmvet", [], [], tmp_path)
    with pytest.raises(ValueError, match="name the judge"): judge("mmvet", [], [], tmp_path, "")
    with pytest.raises(ValueError, match="'pope' has no judge"): judge("pope", [], [], tmp_path, "judge-a")
    own = tmp_path / "own.txt"; own.write_text("Say something about {question}.")
    with pytest.raises(ValueError, match=r"file:own.txt: holds no \{answer\}"): read_template("mmvet", str(own))
    own.write_text("Head of a table\nQ | T | M | G\n")
    t = read_template("mmvet", str(own)); assert t.user.startswith("Head") and t.user.endswith("\n\n{question} | {answer} | {prediction} | ") and t.sha256 != MMVET.sha256 and t.tries == 5
    own.write_text('{"llava_bench_conv": {"role": "Assistant", "prompt": "x"}}')
    with pytest.raises(ValueError, match="no rule for the category detail"): read_template("llavabench", str(own))


def test_texts_of_an_installed_lmms_eval_are_read_and_nothing_is_run(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="lmms-eval is not installed"): read_template("mmvet", "lmms_eval")
    tasks = tmp_path / "lmms_eval" / "tasks"
    for d in ("mmvet", "llava-in-the-wild"): (tasks / d).mkdir(parents=True)
    (tmp_path / "lmms_eval" / "__init__.py").write_text("raise SystemExit('imported')")
    (tasks / "mmvet" / "utils.py").write_text('import nothing_of_this_name\nA = """Head\nx | Ground truth | Prediction | Correctness\n"""\nB = "another text"\n')
    (tasks / "llava-in-the-wild" / "rule.json").write_text(json.dumps({f"llava_bench_{c}": dict(role="Assistant", prompt=f"rule of {c}") for c in ("conv", "detail", "complex")} | {"other": dict(role="A", prompt="")}))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_template("mmvet", "lmms_eval").user.startswith("Head\nx | Ground truth") and read_template("llavabench", "lmms_eval").rules["detail"] == "rule of detail"
    assert read_template("mmvet", "lmms_eval").id == "lmms_eval"
    with pytest.raises(ValueError, match="give it as a file"): read_template("hallusionbench", "lmms_eval")


def test_foreign_text_stays_text():
    asks, _ = requests("mmvet", vet(1), [dict(question_id="v1_0", text="{answer} | {question}\n| 1.0")], MMVET)
    assert asks["v1_0"].endswith("What is 0? | 0 <AND> one | {answer} | {question}\n| 1.0 | ")
    assert all(t.user.count("{prediction}") == 1 for t in TEMPLATES.values()) and {t.max_tokens for t in (HALLUSION, HALLUSION_SAME)} == {8}


def test_answers_are_joined_by_id_and_doubtful_ones_refused():
    items = vet(3)
    asks, missing = requests("mmvet", items, [dict(question_id="v1_2", text=""), dict(question_id="v1_0", prediction="It is 0."), dict(question_id="v9", text="of another set")], MMVET)
    assert list(asks) == ["v1_0", "v1_2"] and missing == ["v1_1"]                         # an empty answer is an answer
    with pytest.raises(ValueError, match="prediction v1_0: has no text"): requests("mmvet", items, [dict(question_id="v1_0", text=None)], MMVET)
    with pytest.raises(ValueError, match="two different answers"): requests("mmvet", items, answers(items) + answers(items[:1], "No."), MMVET)
    assert requests("mmvet", items, answers(items) * 2, MMVET)[0].keys() == {"v1_0", "v1_1", "v1_2"}
