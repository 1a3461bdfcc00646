"""The call engine against a server that misbehaves, and against kills: every question accounted for, none lost, none asked or kept twice."""
import io, json, logging, os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import FAULTS, FaultServer, answer, draw_number, spread

from realign_nb.core import image_hash, read_jsonl
from realign_nb.engine import Asking, BudgetReached, Calls
from realign_nb.masking import check_mask, mask_prompt
from realign_nb.models import ServerVLM, StopAsking, load_vlm
from realign_nb.world import draw, make_scenes

KEY = "sk-test-SECRET-0123456789abcdef"
SERVICE = {"rate_limit", "retry_after", "server_error", "reset", "timeout", "slow"}       # what the client's retries get over
REASONS = {"truncated": "broken reply", "wrong_model": "wrong model", "empty": "empty", "refusal": "refused", "length": "truncated", "rewrite": "altered words"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for s in make_scenes(20, "pairs", seed=5): draw(s).save(folder / f"{s.id}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def hashes(pictures): return {p: image_hash(p) for p in pictures}


def text_of(n): return f"There is a dog and a red car, as in picture number {n} of the set."


def questions(n, pictures):
    "Every other one asks for a mask."
    return {f"q{i:04}": (mask_prompt(text_of(i)) if i % 2 else f"What is in picture {i}?", pictures[i % len(pictures)]) for i in range(n)}


def check(id, text):
    "Of the masks."
    if int(id[1:]) % 2: check_mask(text_of(int(id[1:])), text)


def quick(server, **kw): return ServerVLM("tiny", server.url, api_key=KEY, **(dict(timeout=30.) | kw))


def kept(file):
    "{key: its last word in the file, without the seconds}; nothing may follow a last word."
    lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    out = {}
    for line in lines:
        for r in line["replies"]:
            assert r["key"] not in out or out[r["key"]]["failed"], "a question that had its answer was asked again"
            out[r["key"]] = {k: v for k, v in {**line, **r}.items() if k not in ("replies", "seconds")}
    return out


def accounted(calls, items, replies, vlm, server):
    "Every question has an answer that the server gave to it, or a reason; in the result and in the file, once each."
    records = kept(calls.file)
    assert set(replies) == set(items) and len(records) == len({calls.key(vlm, *q) for q in items.values()})
    for i, r in replies.items():
        record = records[calls.key(vlm, *items[i])]
        assert (record["text"], record["reason"], record["failed"]) == (r.text, r.reason, r.failed)
        if r.reason is None: assert r.text == server.answer(items[i][0], Path(items[i][1]).read_bytes()) and not r.failed
        else: assert len(r.reason.split(":")[0]) < 30 and ";" in r.reason
    assert KEY not in Path(calls.file).read_text(encoding="utf-8") + repr(replies) and server.keys == {f"Bearer {KEY}"}


def under_fault(folder, fault, items, hashes, rate=.2, concurrency=64):
    "One run with one fault: (calls, replies, vlm, server)."
    with FaultServer({fault: rate}, seed=3) as server:
        calls, vlm = Calls(folder / f"{fault}.jsonl", hashes, asking=Asking(concurrency=concurrency)), quick(server, timeout=.8 if fault in ("timeout", "slow") else 30)
        return calls, calls.map("answer", items, vlm, check=check), vlm, server


@pytest.fixture(scope="module")
def each_fault(tmp_path_factory, pictures, hashes):
    "80 questions under each fault by itself; side by side, since most of it is waiting."
    folder, items = tmp_path_factory.mktemp("faults"), questions(80, pictures)
    with ThreadPoolExecutor(6) as pool: return items, dict(zip(FAULTS, pool.map(lambda f: under_fault(folder, f, items, hashes, concurrency=16), FAULTS)))


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_a_fifth_of_the_requests(each_fault, fault):
    items, runs = each_fault
    calls, replies, vlm, server = runs[fault]
    accounted(calls, items, replies, vlm, server)
    assert server.faults[fault] >= 4 and set(server.faults) == {fault}
    bad = [r for r in replies.values() if r.reason]
    assert {r.reason.split(":")[0] for r in bad} <= {REASONS.get(fault)}, [r.reason for r in bad]
    assert all(r.failed == (fault in ("truncated", "wrong_model")) for r in bad)
    if fault in SERVICE: assert not bad and server.requests >= len(items) + server.faults[fault]
    else: assert len(bad) < .12 * len(items) < len(items) < server.requests < 1.4 * len(items)         # asked a second time, and no third


def test_all_faults_together_and_the_next_start(tmp_path, pictures, hashes):
    items, file = questions(500, pictures), tmp_path / "calls.jsonl"
    with FaultServer(spread(.2), seed=1) as server:
        vlm, calls = quick(server, timeout=.8, max_retries=1), Calls(file, hashes, asking=Asking(concurrency=64))
        replies = calls.map("answer", items, vlm, check=check)
        accounted(calls, items, replies, vlm, server)
        assert set(server.faults) == set(FAULTS) and server.most <= 64
        failed = {i for i, r in replies.items() if r.failed}
        server.rates = {}
        again = Calls(file, hashes)
        assert again.reused == 0 and len(again.cache) == len(items) - len(failed)
        done = again.map("answer", items, vlm, check=check)
    assert again.asked == len(failed) > 0 and not any(r.failed for r in done.values())
    assert {i: r for i, r in done.items() if i not in failed} == {i: r for i, r in replies.items() if i not in failed}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_five_hundred_images_under_each_fault(tmp_path, pictures, hashes, fault):
    items = questions(500, pictures)
    calls, replies, vlm, server = under_fault(tmp_path, fault, items, hashes)
    accounted(calls, items, replies, vlm, server)


def test_key_is_in_no_log_and_no_error(tmp_path, pictures, hashes, caplog):
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler); caplog.set_level(logging.DEBUG)
    try:
        with FaultServer(spread(.9), seed=2) as server:
            Calls(tmp_path / "calls.jsonl", hashes).map("answer", questions(30, pictures), quick(server, timeout=.3, max_retries=1))
        echo = lambda prompt, image: f"The key is {KEY}."                                   # a server that tells it
        with FaultServer(answer=echo) as server:
            reply = Calls(tmp_path / "echo.jsonl", hashes).map("answer", questions(1, pictures), quick(server))["q0000"]
    finally: logging.getLogger().removeHandler(handler)
    assert reply.text == "The key is ***."
    assert "HTTP Request" in text.getvalue() and "SECRET" not in text.getvalue()
    assert not any("SECRET" in f.read_text() for f in tmp_path.iterdir()) and "SECRET" not in repr(vars(quick(server))).replace(repr(KEY), "") + repr(quick(server))


def test_retry_after_is_waited_for(pictures):
    with FaultServer({"retry_after": 1.}, retry_after=2) as server:
        start = time.time()
        reply = Calls().map("answer", questions(1, pictures), quick(server, max_retries=1))["q0000"]
    assert time.time() - start >= 2 and server.requests == 2 and reply.failed and reply.reason.startswith("rate limit: HTTP 429, and up to 1 retries")


def test_equal_questions_are_asked_once(tmp_path, pictures, hashes):
    same = {f"same{n}": ("What is this?", pictures[0]) for n in range(40)}
    with FaultServer(latency=.02) as server:
        calls = Calls(tmp_path / "calls.jsonl", hashes)
        replies = calls.map("answer", same | {"other": ("What is this?", pictures[1])}, quick(server))
        assert server.requests == calls.asked == 2 and calls.reused == 39
        assert len({r.text for i, r in replies.items() if i != "other"}) == 1
        calls.map("another stage", same, quick(server))
        assert server.requests == 2 and calls.reused == 79


def test_no_more_calls_under_way_than_asked_for(pictures, hashes):
    for concurrency in (1, 7):
        with FaultServer(latency=.02) as server: Calls(None, hashes, asking=Asking(concurrency=concurrency)).map("answer", questions(28, pictures), quick(server))
        assert server.most == concurrency


@pytest.mark.parametrize("rates", [{}, dict(empty=.1, refusal=.1, rate_limit=.05), dict(truncated=.2)])
def test_budget_is_never_exceeded(tmp_path, pictures, hashes, rates):
    "By the server's own account, with prompts that grow and answers as long as allowed; a greater budget goes on until all is there."
    items = {f"q{n:03}": ("word " * n + f"What is in picture {n}?", pictures[n % 20]) for n in range(120)}
    file, stops, limit, prices = tmp_path / "calls.jsonl", 0, 8, (150, 600)
    with FaultServer(rates, seed=4, latency=.01, answer=lambda prompt, image: "a " * limit) as server:
        for budget in [.05, .3, .7, 1., 1.5, 2., 2.01, 9.]:
            calls = Calls(file, hashes, asking=Asking(concurrency=16, budget=budget, price_in=150., price_out=600.))
            try: replies = calls.map("answer", items, quick(server), max_new_tokens=limit); break
            except BudgetReached as e: stops += 1; assert "answers are there and kept" in str(e) and f"{budget:.4f}" in str(e)
            assert server.charged(*prices) <= calls.spend + 1e-9 and calls.spend <= budget + 1e-9
            if not rates: assert server.charged(*prices) > budget - (150 * (server.dearest + 700) + 600 * limit) / 1e6       # and not long before
    assert stops >= 3 and set(replies) == set(items)
    assert Calls(file, asking=Asking(price_in=150., price_out=600.)).spend == pytest.approx(calls.spend)
    if "truncated" not in rates: assert calls.spend == pytest.approx(server.charged(*prices))


def test_a_budget_that_ends_between_two_tries_leaves_the_question_open(tmp_path, pictures):
    with FaultServer(answer=lambda prompt, image: "") as server:
        price = dict(price_in=1e4, price_out=1e4)
        with pytest.raises(BudgetReached, match="0 of 1 answers"): Calls(tmp_path / "calls.jsonl", asking=Asking(budget=1., **price)).map("answer", questions(1, pictures), quick(server))
        assert server.requests == 1 and [r["failed"] for r in kept(tmp_path / "calls.jsonl").values()] == [True]
        server.answer = lambda prompt, image: "A dog."
        assert Calls(tmp_path / "calls.jsonl").map("answer", questions(1, pictures), quick(server))["q0000"].text == "A dog."


def test_faults_in_front_of_another_server(tmp_path, pictures, hashes):
    with FaultServer() as server, FaultServer(spread(.3), seed=8, upstream=server.url) as proxy:
        replies = Calls(tmp_path / "calls.jsonl", hashes).map("answer", items := questions(60, pictures), vlm := quick(proxy, timeout=2), check=check)
        accounted(type("Kept", (), dict(file=tmp_path / "calls.jsonl", key=Calls(None, hashes).key)), items, replies, vlm, proxy)
        assert proxy.faults and not server.faults and server.answers == proxy.answers


def test_no_service_stops_and_the_next_start_goes_on(tmp_path, pictures, hashes):
    items, file = questions(60, pictures), tmp_path / "calls.jsonl"
    with FaultServer() as server: gone = quick(server, max_retries=0)
    with pytest.raises(StopAsking, match="5 questions in a row failed.*no connection.*of 60 answers"):
        Calls(file, hashes, asking=Asking(give_up=5, concurrency=4)).map("answer", items, gone)
    assert 5 <= len(kept(file)) < 15
    with FaultServer() as server:
        calls = Calls(file, hashes)
        replies = calls.map("answer", items, quick(server))
        assert calls.asked == server.requests == 60 and not any(r.reason for r in replies.values())


def test_nothing_is_asked_after_an_error_of_our_own(tmp_path, pictures, hashes):
    "A full disk, say: the calls under way are dropped, and no more are paid for."
    class Full:
        def write(self, *args, **kw): raise OSError("no space left")
        set_postfix_str = update = write
        def close(self): pass
    with FaultServer(latency=.02) as server:
        with pytest.raises(OSError, match="no space left"):
            Calls(tmp_path / "calls.jsonl", hashes, asking=Asking(concurrency=4), progress=lambda *a: Full()).map("answer", questions(60, pictures), quick(server))
        asked = server.requests; time.sleep(.3)
        assert server.requests == asked < 20 and len(kept(tmp_path / "calls.jsonl")) == 1


def test_a_picture_that_is_gone_is_one_failure_and_asked_again_once_it_is_back(tmp_path, pictures, hashes):
    lost, calls = str(tmp_path / "lost.png"), Calls(None, {**hashes, str(tmp_path / "lost.png"): "0" * 64})
    with FaultServer() as server:
        replies = calls.map("answer", items := questions(4, [*pictures[:3], lost]), quick(server))
        assert [r.reason is None for r in replies.values()] == [True] * 3 + [False] and replies["q0003"].failed and "no such image file" in replies["q0003"].reason
        Path(lost).write_bytes(Path(pictures[5]).read_bytes())
        assert not any(r.reason for r in calls.map("answer", items, quick(server)).values()) and server.requests == 4 and calls.asked == 5


SCRIPT = """
import json, sys
from realign_nb.engine import Asking, Calls
from realign_nb.servers import ServerVLM
url, file, items, concurrency = sys.argv[1:]
asking = Asking(concurrency=int(concurrency))
Calls(file, asking=asking).map("answer", json.load(open(items)), ServerVLM("tiny", url, timeout=20), max_new_tokens=64)
"""


def start(server, file, items, concurrency=8):
    path = Path(file).with_suffix(".items")
    path.write_text(json.dumps(items))
    return subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(file), str(path), str(concurrency)], stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OPENAI_API_KEY=KEY), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # tests in the background ignore it


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition():
        if time.time() > end or process.poll() is not None: process.kill(); raise AssertionError(process.communicate()[1])
        time.sleep(.005)


def count(file): return Path(file).read_bytes().count(b"\n") if Path(file).exists() else 0


def hedged(prompt, image): return "" if draw_number("hedge", prompt) < .1 else answer(prompt, image)


def test_killed_three_times_ends_as_an_unbroken_run(tmp_path, pictures, hashes):
    items = questions(160, pictures)
    with FaultServer(answer=hedged, latency=.02) as server:
        whole = Calls(tmp_path / "whole.jsonl", hashes).map("answer", items, quick(server))
        asked = server.requests
    with FaultServer(answer=hedged, latency=.02) as server:
        broken = tmp_path / "broken.jsonl"
        for lines in (1, 50, 100):
            p = start(server, broken, items)
            wait_for(lambda: count(broken) >= lines, p)
            p.send_signal(signal.SIGKILL); p.communicate()
        with open(broken, "a") as f: f.write('{"stage": "answer", "mod')                   # and a torn line on top
        with pytest.warns(UserWarning, match="torn last line"): calls = Calls(broken, hashes)
        assert calls.map("answer", items, quick(server)) == whole and 0 < calls.asked <= 80
        assert server.requests <= asked + 3 * 2 * 8                                         # of the killed: what was under way
    assert kept(broken) == kept(tmp_path / "whole.jsonl") and sum(r.reason is not None for r in whole.values()) > 5


def test_ctrl_c_waits_for_what_is_under_way(tmp_path, pictures):
    items, file = questions(120, pictures), tmp_path / "calls.jsonl"
    with FaultServer(latency=.2) as server:
        p = start(server, file, items)
        wait_for(lambda: count(file) >= 10, p)
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=30)[1]
        assert p.returncode and "waiting for the answers under way" in err and f"{len(kept(file))} of 120 answers are there and kept" in err and KEY not in err
        assert 10 <= server.answers == count(file) < 120                                    # nothing that was answered is lost
        p = start(server, file, items, 64)
        assert p.wait(60) == 0 and len(kept(file)) == 120 == server.answers


def test_a_second_ctrl_c_leaves_at_once(tmp_path, pictures):
    items, file = questions(20, pictures), tmp_path / "calls.jsonl"
    with FaultServer({"timeout": 1.}) as server:
        p = start(server, file, items)
        wait_for(lambda: server.flying == 8, p)
        p.send_signal(signal.SIGINT); time.sleep(.3)
        assert p.poll() is None                                                             # patient
        p.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in p.communicate(timeout=10)[1] and not file.exists()


class Noted:
    "A real model whose batches are noted; `stop_after` ends it with Ctrl-C after so many."
    settings = {}

    def __init__(self, vlm, stop_after=None): self.vlm, self.name, self.fingerprint, self.spec, self.stop_after, self.seen = vlm, vlm.name, vlm.fingerprint, vlm.spec, stop_after, []

    def generate(self, prompts, images, max_new_tokens=64):
        if len(self.seen) == self.stop_after: raise KeyboardInterrupt
        self.seen.append(list(zip(prompts, images)))
        return self.vlm.generate(prompts, images, max_new_tokens=max_new_tokens)


class Backwards:
    "Workers whose batches come back last first."
    def replies(self, plan, vlm, max_new_tokens):
        for n in reversed(range(len(plan))): yield n, vlm.generate([p for p, _ in plan[n]], [im for _, im in plan[n]], max_new_tokens)


@pytest.fixture(scope="module")
def tiny(): return load_vlm("tiny", device="cpu")


@pytest.mark.parametrize("workers", [None, Backwards()])
def test_local_batches_are_cut_the_same_after_a_break(tmp_path, pictures, hashes, tiny, workers):
    items = {i: ("Describe this image. " * (n % 3) + f"Is there a dog in picture {n}?", im) for n, (i, (_, im)) in enumerate(questions(21, pictures).items())}
    whole = Noted(tiny)
    expected = Calls(tmp_path / "whole.jsonl", hashes, batch_size=4, workers=workers).map("answer", items, whole, 8)
    broken = Noted(tiny, stop_after=2)
    with pytest.raises(KeyboardInterrupt): Calls(tmp_path / "broken.jsonl", hashes, batch_size=4, workers=workers).map("answer", items, broken, 8)
    rest = Noted(tiny)
    calls = Calls(tmp_path / "broken.jsonl", hashes, batch_size=4, workers=workers)
    assert calls.map("answer", items, rest, 8) == expected and calls.reused == len(calls.cache) - calls.asked > 0
    assert broken.seen + rest.seen == whole.seen and len(whole.seen) == 6
    lines = lambda name: [{**line, "replies": [{**r, "seconds": 0} for r in line["replies"]]} for line in read_jsonl(tmp_path / name)]
    assert lines("broken.jsonl") == lines("whole.jsonl")


def test_a_recorded_run_answers_for_its_model(tmp_path, pictures, hashes):
    items = questions(30, pictures)
    with FaultServer(spread(.3, ["empty", "refusal", "length"]), seed=6) as server:
        recorded = Calls(tmp_path / "calls.jsonl", hashes, asking=Asking(tries=1)).map("answer", items, load_vlm(f"server:tiny@{server.url}"), check=check)
    replayed = Calls(tmp_path / "again.jsonl", hashes).map("answer", items, load_vlm(f"replay:{tmp_path / 'calls.jsonl'}"), check=check)
    assert replayed == recorded and any(r.reason for r in replayed.values()) and not all(r.reason for r in replayed.values())
    with pytest.raises(ValueError, match="has no answer to 'What else"): Calls().map("answer", {"a": ("What else?", pictures[0])}, load_vlm(f"replay:{tmp_path / 'calls.jsonl'}"))


def test_bar_counts_every_sample_once(pictures, hashes):
    class Bar:
        def __init__(self, total, done, name): self.total, self.n, self.name, self.text, self.closed = total, done, name, "", False
        def update(self, n): self.n += n
        def set_postfix_str(self, text, refresh=True): self.text = text
        def close(self): self.closed = True
    bars, items = [], questions(30, pictures)
    with FaultServer({"empty": .3}, seed=7) as server:
        calls = Calls(None, hashes, progress=lambda *a: bars.append(Bar(*a)) or bars[-1], asking=Asking(price_in=1e4, price_out=1e4))
        for _ in range(2): calls.map("answer", items | {"twin": items["q0000"]}, quick(server), note="12 pairs")
    assert [(b.total, b.n, b.name, b.closed) for b in bars] == [(31, 31, "answer", True)] * 2
    assert bars[0].text.startswith("12 pairs, $") and f"${calls.spend:.2f}" in bars[0].text and f"{server.requests - 30} asked again" in bars[0].text
