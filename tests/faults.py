"""A chat server on loopback that misbehaves as told: `/v1/chat/completions` over HTTP/1.1, with a fault for a given share of the requests.

    with FaultServer({"server_error": .2}) as server:
        load_vlm(f"server:tiny@{server.url}")

Whether a request meets a fault depends on the seed, the question and how often that question came before, and on nothing else: neither the
order of arrival nor the time. A request meets at most one fault. The server answers by itself (`answer`), or passes questions on (`upstream`).
"""
import asyncio, base64, hashlib, json, socket, struct, threading, urllib.error, urllib.request
from collections import Counter

from realign_nb.masking import MASK, P_COMPLETE, P_MASK, rule_mask
from realign_nb.world import KINDS

FAULTS = ("rate_limit", "retry_after", "server_error", "reset", "timeout", "slow",       # the service fails
          "truncated", "wrong_model",                                                   # it answers 200, and the reply is broken
          "empty", "refusal", "length", "rewrite")                                      # the answer cannot be used
REFUSED = "I'm sorry, but I can't assist with that."


def spread(rate, faults=FAULTS):
    "All faults together at this rate."
    return dict.fromkeys(faults, rate / len(faults))


def draw_number(*of):
    "A number from 0 to 1 (exclusive) that depends on its arguments alone."
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:6], "big") / 2**48


def answer(prompt, image):
    "A mask for P_m, filled holes for P_c, else a sentence with two things in it; depends on the question and the picture alone."
    pick = lambda n: KINDS[int(draw_number("answer", prompt, image, n) * len(KINDS))]
    *_, last = prompt.splitlines()
    if prompt.startswith(P_MASK): return rule_mask(prompt[len(P_MASK):].strip())
    if P_COMPLETE in prompt:
        first, *rest = last.split(MASK)
        return first + "".join(pick(n) + part for n, part in enumerate(rest))
    return f"In the picture there is a {pick(0)} and a {pick(1)}."


class FaultServer:
    "Use as a context manager; all counts are of this server alone."
    def __init__(self, rates=None, seed=0, answer=answer, upstream=None, latency=0., retry_after=1):
        self.rates, self.seed, self.answer, self.upstream, self.latency, self.retry_after = dict(rates or {}), seed, answer, upstream, latency, retry_after
        if not set(self.rates) <= set(FAULTS): raise ValueError(f"unknown faults: {set(self.rates) - set(FAULTS)}")
        if sum(self.rates.values()) > 1 + 1e-9: raise ValueError("a request meets one fault at most: the rates may not add up to more than 1")
        self.requests, self.answers, self.faults, self.keys = 0, 0, Counter(), set()      # requests, answers sent with 200, faults met, Authorization headers
        self.questions, self.tokens = Counter(), [0, 0]                                   # question -> times asked; tokens charged, in and out
        self.flying, self.most, self.dearest = 0, 0, 0                                    # requests under way, now and at most; most input tokens of one

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self.thread.start(); ready.wait(10)
        return self

    def __exit__(self, *args):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    def charged(self, price_in, price_out):
        "Dollars for everything it answered with 200, at these prices per million tokens."
        return (self.tokens[0] * price_in + self.tokens[1] * price_out) / 1e6

    async def _serve(self, ready):
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024, limit=2**26)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await self.over.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}: task.cancel()

    async def _connection(self, reader, writer):
        try:
            while await self._request(reader, writer): pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError): pass
        finally: writer.close()

    async def _request(self, reader, writer):
        "One request; False where the connection ends with it."
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if not head[0].startswith("POST"): self._send(writer, 200, dict(status="ok")); return True
        self.requests += 1; self.flying += 1; self.most = max(self.most, self.flying)
        self.keys.add(headers.get("authorization", ""))
        try: return await self._chat(json.loads(body), reader, writer)
        finally: self.flying -= 1

    def _send(self, writer, status, data, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(data)}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    def fault(self, question):
        "The fault that this request meets, or None."
        u = draw_number(self.seed, question, self.questions[question])
        self.questions[question] += 1
        for name, rate in self.rates.items():
            if u < rate: return name
            u -= rate

    async def _chat(self, body, reader, writer):
        content = body["messages"][-1]["content"]
        prompt = next(c["text"] for c in content if c["type"] == "text")
        image = base64.b64decode(next(c["image_url"]["url"] for c in content if c["type"] == "image_url").split(",", 1)[1])
        fault = self.fault((body["model"], prompt, hashlib.sha256(image).hexdigest()[:16], body.get("max_tokens")))
        if fault == "rewrite" and not prompt.startswith(P_MASK): fault = None
        if fault: self.faults[fault] += 1
        if self.latency: await asyncio.sleep(self.latency)
        if fault in ("rate_limit", "retry_after", "server_error"):
            say = dict(error=dict(message=f"fault: {fault}"))
            self._send(writer, 500 if fault == "server_error" else 429, say, **(dict(Retry_After=self.retry_after) if fault == "retry_after" else {}))
            return True
        if fault == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort(); return False
        if fault == "timeout": await reader.read(1); return False                          # until the client hangs up
        if fault == "slow": return await self._drip(reader, writer)
        status, data = await asyncio.to_thread(self._ask_upstream, body) if self.upstream else (200, self._complete(body, prompt, image))
        if status == 200: data = self._spoil(fault, data)
        self._send(writer, status, data)
        await writer.drain()
        return True

    async def _drip(self, reader, writer):
        "A byte every 50 ms, until the client hangs up."
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
        while not reader.at_eof() and not reader.exception(): writer.write(b" "); await asyncio.sleep(.05)
        return False

    def _complete(self, body, prompt, image):
        "The answer as OpenAI writes it; words count as tokens."
        words = self.answer(prompt, image).split(" ")
        limit = body.get("max_tokens") or len(words)
        message = dict(role="assistant", content=" ".join(words[:limit]), refusal=None)
        usage = dict(prompt_tokens=85 + len(prompt) // 4, completion_tokens=min(len(words), limit))
        return dict(id="chatcmpl-0", object="chat.completion", created=0, model=body["model"], usage=usage | dict(total_tokens=sum(usage.values())),
                    choices=[dict(index=0, message=message, logprobs=None, finish_reason="length" if len(words) > limit else "stop")])

    def _ask_upstream(self, body):
        request = urllib.request.Request(self.upstream.rstrip("/") + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as r: return r.status, json.load(r)
        except urllib.error.HTTPError as e: return e.code, e.read()

    def _spoil(self, fault, data):
        "The reply with its fault, charged."
        choice, usage = data["choices"][0], data.get("usage") or {}
        self.answers += 1
        self.tokens = [self.tokens[0] + usage.get("prompt_tokens", 0), self.tokens[1] + usage.get("completion_tokens", 0)]
        self.dearest = max(self.dearest, usage.get("prompt_tokens", 0))
        text = choice["message"]["content"] or ""
        if fault == "empty": choice["message"]["content"] = ""
        if fault == "refusal": choice["message"]["content"] = REFUSED
        if fault == "length": choice["message"]["content"], choice["finish_reason"] = text[:len(text) // 2], "length"
        if fault == "wrong_model": data["model"] = "another-model-9b"
        if fault == "rewrite": choice["message"]["content"] = "Here you see: " + text.replace("There is", "There was")
        return json.dumps(data).encode()[:60] if fault == "truncated" else data
