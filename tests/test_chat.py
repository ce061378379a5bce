"""The chat teacher against local servers that misbehave on purpose."""

import asyncio
import base64
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import pseudolabel
from pseudolabel import Args, read_rows

fork = multiprocessing.get_context("fork")  # children need not import torch again
KEY = "sk-THE-SECRET-0123456789"


def text_data(n=12, classes=("world", "sports", "business")):
    return common.Data(
        "news", list(classes), common.TextSplit([f"text {i} ." for i in range(n)], None, np.full(n, -1)), None
    )


def answer(content, usage=(100, 2), **more):
    reply = {"choices": [{"message": {"content": content}, **more}]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {}, json.dumps(reply).encode()


def error(status, message, headers=None, **fields):
    return status, headers or {}, json.dumps({"error": {"message": message, **fields}}).encode()


def asked(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def number(body):
    return int(re.search(r"text (\d+) \.", asked(body))[1])


def make_server(behave):
    """`behave(body, headers)` gives (status, headers, content); a number waits that long; bytes are sent, then cut."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = behave(body, self.headers) if self.path == "/v1/chat/completions" else error(404, self.path)
            try:
                if isinstance(reply, (int, float)):
                    time.sleep(reply)
                elif isinstance(reply, bytes):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(reply) + 100))
                    self.end_headers()
                    self.wfile.write(reply)
                else:
                    self.send_response(reply[0])
                    for name, value in {"Content-Length": str(len(reply[2])), **reply[1]}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply[2])
            except OSError:
                pass  # the client was killed

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

    return Server(("127.0.0.1", 0), Handler)


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> address of a server in a thread of this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(pseudolabel.random, "uniform", lambda low, high: 0.05)  # short pauses
    monkeypatch.setattr(pseudolabel.random, "random", lambda: 0.0)
    servers = []

    def start(behave):
        servers.append(make_server(behave))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def run(data, tmp_path, url, **changes):
    settings = {
        "teacher": "chat",
        "model": "m",
        "output": str(tmp_path / "labels.jsonl"),
        "base_url": url,
        **changes,
    }
    return pseudolabel.label(data, Args(**settings))


def rows_in(tmp_path):
    return {row["index"]: row for row in read_rows(tmp_path / "labels.jsonl")[1] if "index" in row}


# ---------------------------------------------------------------------------- requests and replies


def test_every_text_is_asked_once_and_its_answer_kept(serve, tmp_path):
    seen, data = [], text_data(12)

    def behave(body, headers):
        seen.append((body, headers))
        return answer(["World.", "**sports**", "I cannot say"][number(body) % 3])

    result = run(data, tmp_path, serve(behave), price_in=2, price_out=10)
    assert sorted(number(body) for body, _ in seen) == list(range(12))
    assert all(headers["Authorization"] is None for _, headers in seen)  # no key for a host that is not OpenAI's
    body = seen[0][0]
    assert body["temperature"] == 0 and body["max_tokens"] == 32 and body["model"] == "m"
    assert "world, sports, business" in asked(body) and "logprobs" not in body
    labels, probs = pseudolabel.read_labels(result["path"], data, "train")
    assert labels.tolist() == [0, 1, -1] * 4 and probs is None
    assert rows_in(tmp_path)[4]["raw"] == "**sports**"
    assert result["tokens"] == [1200, 24] and result["cost"] == pytest.approx(1200 * 2e-6 + 24 * 10e-6)
    assert result["abstentions"] == 4 and result["classes"] == {"world": 4, "sports": 4, "business": 0}


def test_images_go_as_png_of_the_asked_size(serve, tmp_path):
    data, sizes = common.load_data("digits", ""), []
    data.test.x, data.test.y = data.test.x[:3], data.test.y[:3]

    def behave(body, headers):
        kind, png = body["messages"][0]["content"][1]["image_url"]["url"].split(",")
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        sizes.append((kind, image.format, image.mode, image.size))
        return answer("3")

    run(data, tmp_path, serve(behave), split="test", image_size=48)
    assert sizes == [("data:image/png;base64", "PNG", "RGB", (48, 48))] * 3


def test_long_texts_are_cut_and_the_options_are_not(serve, tmp_path):
    data, seen = (
        common.Data("news", ["world", "sports"], common.TextSplit(["x" * 5000 + "END"], None, np.array([-1])), None),
        [],
    )

    def behave(body, headers):
        seen.append(asked(body))
        return answer("world")

    run(data, tmp_path, serve(behave), max_chars=100)
    assert seen[0].count("x" * 100) == 1 and "x" * 101 not in seen[0] and "world, sports" in seen[0]


def test_letters_and_token_probabilities_become_probs(serve, tmp_path):
    def behave(body, headers):
        assert "A) world, B) sports, C) business" in asked(body) and body["logprobs"] and body["top_logprobs"] == 20
        others = {"B": 0.5, " b": 0.1, "A": 0.2, "Z": 0.1, "sports": 0.05}
        top = [{"token": token, "logprob": float(np.log(p))} for token, p in others.items()]
        first = {"token": "\n", "logprob": -0.1, "top_logprobs": top[2:]}
        return answer("B", logprobs={"content": [first, {"token": "B", "logprob": -0.7, "top_logprobs": top}]})

    data = text_data(3)
    run(data, tmp_path, serve(behave), logprobs=True)
    labels, probs = pseudolabel.read_labels(tmp_path / "labels.jsonl", data, "train")
    assert labels.tolist() == [1, 1, 1]
    assert probs[0] == pytest.approx([0.25, 0.75, 0], abs=1e-4)  # 0.2, 0.5 + 0.1 and nothing, of 0.8


def test_a_token_without_probabilities_gives_a_label(serve, tmp_path):
    def behave(body, headers):
        return answer("C", logprobs={"content": [{"token": "C", "logprob": -0.1, "top_logprobs": []}]})

    result = run(text_data(2), tmp_path, serve(behave), logprobs=True)
    assert result["classes"]["business"] == 2 and result["with_probs"] == 0


def test_an_endpoint_that_ignores_logprobs_gives_labels(serve, tmp_path):
    result = run(text_data(3), tmp_path, serve(lambda body, headers: answer("(C)")), logprobs=True)
    assert result["classes"]["business"] == 3 and result["with_probs"] == 0


def test_options_that_are_refused_are_left_out_from_then_on(serve, tmp_path):
    """max_tokens, temperature, response_format: each is refused once, not once an example."""
    refused = []

    def behave(body, headers):
        for name in ("max_tokens", "temperature", "response_format"):
            if name in body:
                refused.append(name)
                return error(400, f"Unsupported parameter: '{name}'. Use 'max_completion_tokens' instead.", param=name)
        assert body["max_completion_tokens"] == 7
        return answer('{"label": "sports"}')

    result = run(text_data(40), tmp_path, serve(behave), json_schema=True, max_tokens=7, concurrency=8)
    assert sorted(refused) == ["max_tokens", "response_format", "temperature"]
    assert result["classes"]["sports"] == 40


def test_a_json_schema_names_the_classes(serve, tmp_path):
    def behave(body, headers):
        schema = body["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["properties"]["label"]["enum"] == [
            "world",
            "sports",
            "business",
        ]
        return answer('{"label":\n"business"}')

    assert run(text_data(2), tmp_path, serve(behave), json_schema=True)["classes"]["business"] == 2


# ---------------------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    "trouble",
    [
        error(408, "slow"), error(409, "conflict"), error(429, "rate limit"), error(500, "oops"), error(503, "busy"),
        b'{"choices": [', (200, {}, b"no JSON"), (200, {}, b"[]"), (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": 7}}]}'), (200, {}, b'{"error": {"message": "later"}}'), 1.5,
    ],
)  # fmt: skip
def test_passing_trouble_is_asked_again(serve, tmp_path, trouble):
    count = {}

    def behave(body, headers):
        count[number(body)] = count.get(number(body), 0) + 1
        return trouble if count[number(body)] < 3 else answer("sports")

    result = run(text_data(3), tmp_path, serve(behave), timeout=0.7)
    assert result["classes"]["sports"] == 3 and count == {0: 3, 1: 3, 2: 3}


def test_an_answer_that_trickles_in_is_given_up_at_the_time_limit(monkeypatch):
    """Every byte comes in time, all of them would not."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def trickle():
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while True:
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    threading.Thread(target=trickle, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    endpoint = pseudolabel.Endpoint(Args(base_url=url, model="m", timeout=0.5), ["a"])
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        endpoint.post(b"{}")
    assert time.monotonic() - start < 5
    listener.close()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(serve, tmp_path, form):
    times = []

    def behave(body, headers):
        times.append(time.time())
        after = "1" if form == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
        return error(429, "slow down", {"Retry-After": after}) if len(times) == 1 else answer("world")

    run(text_data(1), tmp_path, serve(behave))
    assert times[1] - times[0] >= 0.95


@pytest.mark.parametrize(
    "end, message",
    [
        (error(400, "bad request"), "status 400.*bad request"),
        (error(401, "wrong key"), "status 401.*wrong key"),
        (error(403, "not yours"), "status 403"),
        (error(404, "no such model"), "status 404.*no such model"),
        (error(402, "pay first"), "status 402"),
        (error(307, "elsewhere", {"Location": "http://127.0.0.1:9/v1"}), "status 307"),
        (error(429, "You exceeded your quota", code="insufficient_quota"), "status 429.*insufficient_quota"),
        (error(429, "come back tomorrow", {"Retry-After": "7200"}), "status 429"),
    ],
)
def test_lasting_trouble_stops_at_once_with_everything_saved(serve, tmp_path, end, message):
    """The sixth example is refused; the others in flight are still taken, no further one is asked."""
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        if number(body) == 5:
            return end
        time.sleep(0.1)
        return answer("world")

    with pytest.raises(common.UserError, match=message):
        run(text_data(200), tmp_path, serve(behave), concurrency=4)
    assert len(seen) == len(set(seen)) <= 12
    assert set(rows_in(tmp_path)) == set(seen) - {5}


def test_one_filtered_text_is_an_abstention_and_the_run_goes_on(serve, tmp_path):
    def behave(body, headers):
        return error(400, "no " * 200, code="content_filter") if number(body) == 3 else answer("world")

    assert run(text_data(6), tmp_path, serve(behave))["abstentions"] == 1
    assert rows_in(tmp_path)[3]["label"] is None and "status 400" in rows_in(tmp_path)[3]["raw"]


def test_an_example_without_a_reply_is_left_for_the_next_run(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudolabel, "ATTEMPTS", 2)
    broken = {3}

    def behave(body, headers):
        return error(500, "no") if number(body) in broken else answer("world")

    url = serve(behave)
    assert run(text_data(6), tmp_path, url)["labeled"] == 5
    with pytest.raises(common.UserError, match="1 of 6 examples have no label yet"):
        pseudolabel.read_labels(tmp_path / "labels.jsonl", text_data(6), "train")
    broken.clear()
    assert run(text_data(6), tmp_path, url)["labeled"] == 6


def test_an_endpoint_that_is_down_stops_the_run(tmp_path, monkeypatch, serve):
    monkeypatch.setattr(pseudolabel, "ATTEMPTS", 2)
    with pytest.raises(common.UserError, match="no reply"):
        run(text_data(500), tmp_path, "http://127.0.0.1:9/v1")
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        return answer("world") if len(seen) < 5 else error(500, "no")

    with pytest.raises(common.UserError, match="no reply"):
        run(text_data(500), tmp_path, serve(behave), concurrency=4)
    assert len(seen) < 60


# ---------------------------------------------------------------------------- money


def test_a_dry_run_asks_few_keeps_their_answers_and_estimates(serve, tmp_path, capsys):
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        return answer("world", usage=(1000, 10))

    url = serve(behave)
    run(text_data(100), tmp_path, url, dry_run=5, price_in=1, price_out=1)
    assert len(seen) == 5 and max(seen) >= 60  # spread over the part
    assert "estimate for all 100: 100000 tokens in, 1000 out, cost 0.1010" in capsys.readouterr().out
    run(text_data(100), tmp_path, url)
    assert sorted(seen) == list(range(100))


def test_the_cost_stays_below_its_limit_over_several_runs(serve, tmp_path):
    def behave(body, headers):
        time.sleep(0.02)
        return answer("world", usage=(1000, 32))

    url, price = serve(behave), (1000 * 10 + 32 * 10) / 1e6  # 0.01032 each
    limits = [0.055, 0.1, 0.3]
    for limit in limits:
        result = run(text_data(100), tmp_path, url, price_in=10, price_out=10, max_cost=limit, concurrency=16)
        assert limit - 1.001 * price < result["cost"] <= limit


def test_tokens_of_unusable_replies_are_counted(serve, tmp_path):
    """The first reply to each has no choices but was billed; the example that never gets one is billed too."""
    count = {}

    def behave(body, headers):
        count[number(body)] = count.get(number(body), 0) + 1
        if count[number(body)] == 1 or number(body) == 2:
            return (
                200,
                {},
                json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}).encode(),
            )
        return answer("world", usage=(10, 1))

    result = run(text_data(3), tmp_path, serve(behave), concurrency=1)
    assert result["labeled"] == 2 and result["tokens"] == [
        2 * 17 + 7 * pseudolabel.ATTEMPTS,
        4 + pseudolabel.ATTEMPTS,
    ]
    assert (
        pseudolabel.summary(Path(result["path"]), read_rows(Path(result["path"]))[1], text_data(3), Args())["labeled"]
        == 2
    )


def test_the_same_limit_again_asks_nothing_more(serve, tmp_path):
    calls = []

    def behave(body, headers):
        calls.append(1)
        return answer("world", usage=(1000, 32))

    url = serve(behave)
    for _ in range(3):
        run(text_data(100), tmp_path, url, price_in=10, price_out=10, max_cost=0.055)
    assert len(calls) == 5


def test_max_cost_without_usage_in_the_replies_still_stops(serve, tmp_path):
    calls = []

    def behave(body, headers):
        calls.append(1)
        return answer("world", usage=(1000, 32) if len(calls) == 1 else None)

    run(text_data(100), tmp_path, serve(behave), price_in=10, price_out=10, max_cost=0.055)
    assert len(calls) == 5  # each is taken to cost as much as the dearest


# ---------------------------------------------------------------------------- the key


def test_the_key_is_in_no_file_and_no_output(tmp_path, serve, monkeypatch):
    """The server sees it, and returns it in answers and errors."""
    keys = []

    def behave(body, headers):
        keys.append(headers["Authorization"])
        if len(keys) == 9:
            return error(401, f"{'x' * 268} {headers['Authorization']}")  # cut within the key
        return answer(f"world {KEY}") if len(keys) % 2 else error(500, f"failed for {headers['Authorization']}")

    texts = tmp_path / "run"
    texts.mkdir()
    command = [
        sys.executable, pseudolabel.__file__, "--teacher", "chat", "--model", "m", "--base-url", serve(behave),
        "--key-variable", "MY_KEY", "--concurrency", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=texts, env={**os.environ, "MY_KEY": KEY + "\n"}, capture_output=True, text=True)
    assert done.returncode == 2 and set(keys) == {f"Bearer {KEY}"} and len(keys) == 9
    assert re.search(r"error: .*status 401.*xxx", done.stderr) and done.stderr.count("Traceback") == 0
    files = [path for path in texts.rglob("*") if path.is_file()]
    assert len(files) == 1 and "world [key]" in files[0].read_text()
    assert not any(KEY[:5] in text for text in [done.stdout, done.stderr, *(path.read_text() for path in files)])


def test_the_key_of_openai_goes_to_no_other_host(serve, tmp_path, monkeypatch):
    seen = []

    def behave(body, headers):
        seen.append(headers["Authorization"])
        return answer("world")

    url = serve(behave)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run(text_data(1), tmp_path, url)
    assert seen == [None]


def test_a_missing_or_unprintable_key_is_one_line_without_it(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(common.UserError, match="OPENAI_API_KEY: expected the API key for api.openai.com"):
        pseudolabel.Endpoint(Args(model="m"), ["a"])
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Header: 1")
    with pytest.raises(common.UserError) as caught:
        pseudolabel.Endpoint(Args(model="m"), ["a"])
    assert KEY not in str(caught.value)
    with pytest.raises(common.UserError, match="--base-url file"):
        pseudolabel.Endpoint(Args(model="m", base_url="file:///etc"), ["a"])


# ---------------------------------------------------------------------------- killed and stopped runs


def misbehaving(log, index_of, y):
    """30 % of the replies are trouble; every request and what became of it goes to `log`."""

    def behave(body, headers):
        index = index_of[body["messages"][0]["content"][1]["image_url"]["url"]]
        kind = random.choice(["429", "500", "hang", "cut", "JSON", "wrong"]) if random.random() < 0.3 else "right"
        paid = kind in ("right", "wrong")
        with open(log, "a") as file:
            file.write(json.dumps([index, paid]) + "\n")
        return {
            "429": error(429, "slow down", {"Retry-After": "1"}), "500": error(500, "oops"), "hang": 3.0,
            "cut": answer("5")[2][:30], "JSON": (200, {}, b'{"choices": [{"text"'), "wrong": answer("a banana"),
            "right": answer(f"It is a {y[index]}."),
        }[kind]  # fmt: skip

    server = make_server(behave)
    process = fork.Process(target=server.serve_forever, daemon=True)
    process.start()
    return process, f"http://127.0.0.1:{server.server_port}/v1"


def quietly(function, *arguments):
    """A forked child that writes nothing to the terminal."""

    def child():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        function(*arguments)

    process = fork.Process(target=child, daemon=True)
    process.start()
    return process


def whole_indices(path):
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [json.loads(line)["index"] for line in lines if b"index" in line]


def test_ten_kills_lose_no_answer_and_pay_none_twice_beyond_what_was_in_flight(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data, path, log, at_once = common.load_data("digits", ""), tmp_path / "labels.jsonl", tmp_path / "log", 12
    index_of = {pseudolabel.data_url(x, 16): i for i, x in enumerate(data.test.x)}
    assert len(index_of) == 500
    process, url = misbehaving(log, index_of, data.test.y)
    args = Args(
        split="test", teacher="chat", model="m", base_url=url, concurrency=at_once, timeout=1.0, image_size=16,
        output=str(path),
    )  # fmt: skip
    log.touch()
    try:
        kills, paid_in_all, sessions, after = 0, 0, 0, set()
        while len(after) < 500:
            sessions += 1
            assert sessions <= 40
            before, logged = set(whole_indices(path)), log.stat().st_size
            child = quietly(pseudolabel.label, data, args)
            deadline = time.time() + 60
            while kills < 10 and child.is_alive() and len(whole_indices(path)) < min(495, len(before) + 40):
                assert time.time() < deadline
                time.sleep(0.002)
            if kills < 10:
                kills += child.is_alive()
                child.kill()
            child.join(120)
            time.sleep(0.1)  # requests on their way to the server are logged
            after = set(whole_indices(path))
            with open(log) as file:
                file.seek(logged)
                requests = [json.loads(line) for line in file]
            paid = [index for index, was_paid in requests if was_paid]
            assert not before & {index for index, _ in requests}, "an answer that was in the file was asked for again"
            assert after - before <= set(paid) and before <= after
            assert len(paid) - len(after - before) <= at_once, "more lost than was in flight"
            paid_in_all += len(paid)
    finally:
        process.kill()
    assert kills == 10
    indices = whole_indices(path)
    assert sorted(indices) == list(range(500))  # each exactly once
    assert 500 <= paid_in_all <= 500 + 10 * at_once
    print(f"{kills} kills, {sessions} sessions, {paid_in_all} answers paid for 500 labels")
    labels, _ = pseudolabel.read_labels(path, data, "test")
    rows = {row["index"]: row for row in read_rows(path)[1]}
    assert all(labels[i] == (data.test.y[i] if "It is" in rows[i]["raw"] else -1) for i in range(500))
    assert 5 < (labels == -1).sum() < 100


@pytest.mark.parametrize("number_of_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_summary_and_the_answers_in_flight(tmp_path, monkeypatch, number_of_signal):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    counted = fork.Value("i", 0)

    def behave(body, headers):
        with counted.get_lock():
            counted.value += 1
        time.sleep(0.3)
        return answer("3")

    server = make_server(behave)
    process = fork.Process(target=server.serve_forever, daemon=True)
    process.start()
    path, output = tmp_path / "labels.jsonl", tmp_path / "output"

    def child():
        sys.stdout = sys.stderr = open(output, "w", buffering=1)
        sys.argv = f"pseudolabel.py --split test --teacher chat --model m --output {path} --concurrency 8".split()
        sys.argv += ["--base-url", f"http://127.0.0.1:{server.server_port}/v1"]
        common.cli(Args, pseudolabel.main)

    run_child = fork.Process(target=child, daemon=True)
    run_child.start()
    deadline = time.time() + 60
    while len(whole_indices(path)) < 12:
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(run_child.pid, number_of_signal)
    run_child.join(20)
    process.kill()
    assert run_child.exitcode == 130
    rows = whole_indices(path)
    assert len(rows) == len(set(rows)) == counted.value < 60  # whatever was asked was kept
    text = output.read_text()
    assert f"{len(rows)} of 500 labeled" in text and "Traceback" not in text


# ---------------------------------------------------------------------------- speed


def fifty_milliseconds(port):
    """A light server: it has to keep up with 64 requests at a time on the same two cores."""
    reply = answer("sports")[2]

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(reply) + reply)
        writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=512)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(main())


def test_sixty_four_requests_at_once_are_thirty_times_as_fast_as_one_by_one(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = fork.Value("i", 0)
    process = fork.Process(target=fifty_milliseconds, args=(port,), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)

    def rate(n, concurrency):
        args = Args(teacher="chat", model="m", base_url=f"http://127.0.0.1:{port.value}/v1", concurrency=concurrency)
        start = time.perf_counter()
        rows = list(pseudolabel.label_with_chat(text_data(n), list(range(n)), args, "Topic of {text}? {options}"))
        assert len(rows) == n
        return n / (time.perf_counter() - start)

    try:
        one = rate(20, 1)
        for _ in range(3):
            many = rate(960, 64)
            if many >= 30 * one:
                break
    finally:
        process.kill()
    print(f"{one:.1f} and {many:.0f} requests a second: {many / one:.1f} times")
    if many < 30 * one and os.getloadavg()[0] > os.cpu_count():
        pytest.skip(f"{many / one:.0f} times as fast while other processes want the cores")
    assert many >= 30 * one


# ---------------------------------------------------------------------------- a real server


def test_a_real_local_server_answers(tmp_path, monkeypatch):
    """transformers' own server with a tiny model made on the spot; needs pip install transformers[serving]."""
    for module in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(module)
    import socket
    import urllib.request

    from tiny_models import causal_model

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    causal_model(tmp_path / "tiny", chat=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", str(tmp_path / "tiny"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--default-seed", "0"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        result = run(text_data(4), tmp_path, f"http://127.0.0.1:{port}/v1", model=str(tmp_path / "tiny"), max_tokens=4)
    finally:
        server.kill()
    assert result["labeled"] == 4 and result["tokens"][0] > 40 and 4 <= result["tokens"][1] <= 16
