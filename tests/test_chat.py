"""The chat teacher: what replies mean, and whole runs against servers that misbehave on purpose."""

import base64
import io
import itertools
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
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import common
import pseudolabel
from pseudolabel import Args, classify, read_rows

fork = multiprocessing.get_context("fork")  # children need not import torch again
KEY = "sk-THE-SECRET-0123456789"
CLASSES = ["world", "sports", "business"]


def text_data(n=12):
    texts = common.Split(np.array([f"text {i} ." for i in range(n)], object), np.full(n, -1))
    return common.Data("news", CLASSES, texts, None)


def answer(content, usage=(100, 2), **more):
    reply = {"choices": [{"message": {"content": content}, **more}]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {}, json.dumps(reply).encode()


def error(status, message, headers=None, **fields):
    body = {"error": {"message": message, **fields}}
    return status, headers or {}, json.dumps(body).encode()


def asked(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def number(body):
    return int(re.search(r"text (\d+) \.", asked(body))[1])


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 256, True


def make_server(behave):
    """`behave(body, headers)` gives a reply; a number: a wait without one; bytes: a cut reply."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            right = self.path.partition("?")[0] == "/v1/chat/completions"
            self.headers["Asked-For"] = self.path
            reply = behave(body, self.headers) if right else error(404, self.path)
            if isinstance(reply, (int, float)):
                return time.sleep(reply)
            cut = 0
            if isinstance(reply, bytes):
                cut, reply = 100, (200, {}, reply)
            status, headers, content = reply
            try:
                self.send_response(status)
                for item in {"Content-Length": str(len(content) + cut), **headers}.items():
                    self.send_header(*item)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client was killed

        def log_message(self, *args):
            pass

    return Server(("127.0.0.1", 0), Handler)


def address(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> address of a server in a thread of this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(pseudolabel, "PAUSE", 0.01)
    servers = []

    def start(behave):
        servers.append(make_server(behave))
        run = servers[-1].serve_forever
        threading.Thread(target=run, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return address(servers[-1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def forked(monkeypatch):
    """forked(behave) -> address of a server in a process of its own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    processes = []

    def start(behave):
        server = make_server(behave)
        processes.append(fork.Process(target=server.serve_forever, daemon=True))
        processes[-1].start()
        return address(server)

    yield start
    for process in processes:
        process.kill()


def run(data, tmp_path, url, **changes):
    settings = {"teacher": "chat", "model": "m", "output": str(tmp_path / "labels.jsonl")}
    return pseudolabel.label(data, Args(**settings | {"base_url": url} | changes))


def rows_in(tmp_path):
    return {row["index"]: row for row in read_rows(tmp_path / "labels.jsonl")[1] if "label" in row}


def counts(tmp_path):
    """Labels of each class of `text_data` in the file."""
    labels = [row["label"] for row in rows_in(tmp_path).values() if row["label"] is not None]
    return Counter(CLASSES[label] for label in labels)


# ---------------------------------------------------------------------------- what a reply means

PART = {"type": "text", "text": "sports"}
CUT = {"hint": "; reasoning models need a larger --max-tokens"}
ADDRESS = {"hint": "; check --base-url"}
HINT = {401: "; name the variable with its key: --key-variable"}
HINT[307] = "; the server redirects to https://b"
VLLM = "'max_tokens' is too large: 32. This model's maximum context length is 250 tokens"


def message(**fields):
    return 200, {}, json.dumps({"choices": [{"message": fields, "finish_reason": "stop"}]}).encode()


WITHIN = json.dumps({"error": {"message": "busy", "code": 429}, "usage": {"prompt_tokens": 7}})


@pytest.mark.parametrize(
    "reply, kind, expected",
    [
        (answer("World."), "answered", {"text": "World.", "usage": [100, 2], "hint": ""}),
        (answer([{"type": "thinking", "thinking": []}, PART]), "answered", {"text": "sports"}),
        (answer("x", None), "answered", {"usage": [0, 0]}),
        (answer("x", (9.0, -1)), "answered", {"usage": [9, 0]}),
        (answer("x", (10**400, 1)), "answered", {"usage": [10**12, 1]}),
        (answer("x", ("9 tokens", 1e400)), "answered", {"usage": [0, 0]}),
        (answer("x", (9.0, float("nan"))), "answered", {"usage": [0, 0]}),
        ((200, {}, answer("x")[2].replace(b"{\"prompt_tokens\": 100", b"3, \"_\": {\"x\": 0")),
         "answered", {"usage": [0, 0]}),
        (answer("x", logprobs={"content": []}), "answered", {"logprobs": {"content": []}}),
        (answer("It is about", finish_reason="length"), "answered", CUT),
        (answer(None, finish_reason="length"), "ask again", CUT | {"tries": 1}),
        (answer("", finish_reason="max_tokens"), "ask again", CUT | {"tries": 1}),
        (answer("<think>world, or", finish_reason="stop"), "ask again", CUT | {"tries": 1}),
        (message(content=None, reasoning_content="Well"), "ask again", CUT | {"tries": 1}),
        (message(content="", reasoning="Well"), "ask again", CUT | {"tries": 1}),
        (message(content=None, refusal="I can't"), "no answer", {"tries": 2, "hint": ""}),
        (answer(""), "no answer", {"tries": 2, "usage": [100, 2]}),
        ((200, {}, b'{"choices": [], "usage": {"prompt_tokens": 9}}'), "no answer",
         {"tries": 2, "usage": [9, 0]}),
        ((200, {}, b'{"choices": [{"message": null}]}'), "no answer", {"tries": 2}),
        (answer("", finish_reason="error"), "ask again", {"tries": 8}),
        (answer(7), "ask again", {"usage": [100, 2], "tries": 8}),
        ((200, {}, b"no JSON"), "ask again", {"text": "no JSON", "tries": 8}),
        ((200, {}, b"\xff["), "ask again", {"tries": 8}),
        ((200, {}, b"[]"), "ask again", {"tries": 8}),
        ((200, {}, b"[" * 100_000), "ask again", {"tries": 8}),
        ((200, {"Retry-After": "3"}, WITHIN.encode()), "ask again", {"after": 3, "usage": [7, 0]}),
        ((200, {}, b'{"error": {"code": 401, "message": "key"}}'), "stop", {}),
        ((200, {}, b'{"error": {"code": "402", "message": "Insufficient credits"}}'), "stop", {}),
        ((200, {}, b'{"choices": [{"error": {"code": 502}}]}'), "ask again", {"tries": 8}),
        ((200, {}, b'{"error": {"message": "later"}}'), "ask again", {"tries": 8}),
        ((200, {}, b'{"error": "later"}'), "ask again", {"tries": 8}),
        *[(error(status, said), "no answer", {"tries": 1, "without": []}) for status, said in (
            (400, "Content Exists Risk"), (400, "data_inspection_failed"), (403, "moderation"),
            (422, "bad words"), (400, "bad request"), (413, "too much"), (451, "for legal reasons"),
            (400, "no response_format"),  # of --extra-body: the user wants it
        )],
        (error(500, "Context size has been exceeded."), "no answer", {"tries": 1}),
        (error(500, "context deadline exceeded"), "ask again", {"tries": 8}),
        (error(400, VLLM), "no answer", {"without": ()}),
        (error(400, "max_completion_tokens, not logprobs"), "no answer", {"without": ["logprobs"]}),
        (error(422, "temperature"), "no answer", {"without": ["temperature"]}),
        (error(401, "temperature"), "stop", {"hint": HINT[401]}),
        (error(402, "pay first"), "stop", {}),
        (error(400, "Your credit balance is too low to access the API"), "stop", {}),
        (error(403, "Sorry, your account balance is insufficient"), "stop", {}),
        (error(422, "not about insufficient credit, please"), "no answer", {}),  # quotes the text
        (error(404, "no such model"), "stop", {}),
        (error(204, ""), "stop", {}),
        (error(307, "elsewhere", {"Location": "https://b"}), "stop", {"hint": HINT[307]}),
        *[(error(status, ""), "ask again", {"after": 0, "tries": 8})
          for status in (0, 408, 409, 425, 500, 503, 529, 599)],
        (error(429, "slow", {"Retry-After": "2.5"}), "ask again", {"after": 2.5}),
        (error(429, "slow", {"Retry-After": "soon"}), "ask again", {"after": 0}),
        (error(429, "quota", code="insufficient_quota"), "stop", {}),
        (error(429, "tomorrow", {"Retry-After": "7200"}), "stop", {}),
        ((0, {}, b"SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]"), "stop",
         {"hint": "; set SSL_CERT_FILE to the certificate of your authority"}),
        ((0, {}, b"gaierror: [Errno -2] Name or service not known"), "stop", ADDRESS),
        ((0, {}, b"ConnectionRefusedError: [Errno 111] Connection refused"), "stop", ADDRESS),
        ((0, {}, b"SSLError: [SSL: WRONG_VERSION_NUMBER] wrong"), "stop", ADDRESS),
        ((0, {}, b"TimeoutError: timed out"), "ask again", {"tries": 8}),
        ((0, {}, b"RemoteDisconnected: closed"), "ask again", {"tries": 8}),
    ],
)  # fmt: skip
def test_what_a_reply_means(reply, kind, expected):
    verdict = classify(*reply)._asdict()
    assert verdict["kind"] == kind
    assert {field: verdict[field] for field in expected} == expected


# ---------------------------------------------------------------------------- requests and answers


def test_every_text_is_asked_once_and_its_answer_kept(serve, tmp_path, monkeypatch):
    seen, data = [], text_data(12)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # for another host

    def behave(body, headers):
        seen.append((body, headers))
        return answer(["World.", "**sports**", "I cannot say"][number(body) % 3])

    result = run(data, tmp_path, serve(behave), price_in=2, price_out=10)
    assert sorted(number(body) for body, _ in seen) == list(range(12))
    assert all(headers["Authorization"] is None for _, headers in seen)
    body = seen[0][0]
    assert body["temperature"] == 0 and body["max_tokens"] == 32 and body["model"] == "m"
    assert "world, sports, business" in asked(body) and "logprobs" not in body
    labels, probs = pseudolabel.read_labels(result["path"], data, "train")
    assert labels.tolist() == [0, 1, -1] * 4 and probs is None and result["abstentions"] == 4
    assert rows_in(tmp_path)[4]["raw"] == "**sports**"
    assert result["tokens"] == [1200, 24]
    assert result["cost"] == pytest.approx(1200 * 2e-6 + 24 * 10e-6)


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


def picture_data(tmp_path, *sizes):
    """Pictures of these sizes, left half red, right half blue; beside them small gray squares."""
    files = []
    for i, size in enumerate(sizes):
        picture = Image.new("RGB", size, (200, 0, 0))
        picture.paste((0, 0, 200), (size[0] // 2, 0, *size))
        files.append(str(tmp_path / f"{i}.png"))
        picture.save(files[-1])
    x = np.full((len(sizes), 3, 32, 32), 128, np.uint8)
    part = common.Split(x, np.full(len(sizes), -1), np.array(files))
    return common.Data("pictures", ["cat", "dog"], part, None)


@pytest.mark.parametrize("longest", [512, 100])
def test_pictures_go_as_their_files_have_them(serve, tmp_path, longest):
    """Not the stored square; large ones are shrunk, small ones enlarged to 224."""
    data, seen = picture_data(tmp_path, (1024, 256), (300, 400), (20, 10)), []

    def behave(body, headers):
        kind, content = body["messages"][0]["content"][1]["image_url"]["url"].split(",")
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        seen.append((kind, picture.format, picture.size))
        for column, red in ((0.25, True), (0.75, False)):
            at = int(column * picture.width), picture.height // 2
            color = picture.getpixel(at)
            assert (color[0] > 180 and color[2] < 20) == red and (color[2] > 180) != red
        return answer("cat")

    run(data, tmp_path, serve(behave), concurrency=1, image_size=longest)
    sizes = {512: [(512, 128), (300, 400), (224, 112)], 100: [(100, 25), (75, 100), (100, 50)]}
    assert seen == [("data:image/jpeg;base64", "JPEG", size) for size in sizes[longest]]
    settings = read_rows(tmp_path / "labels.jsonl")[0]["settings"]
    assert settings["image_size"] == longest


def test_long_texts_are_cut_and_the_options_are_not(serve, tmp_path):
    data, seen = text_data(1), []
    data.train.x[0] = "x" * 5000 + "END"

    def behave(body, headers):
        seen.append(asked(body))
        return answer("world")

    run(data, tmp_path, serve(behave), max_chars=100)
    assert re.search("[^x]x{100}[^x]", seen[0]) and "world, sports" in seen[0]


def test_letters_and_token_probabilities_become_probs(serve, tmp_path):
    def behave(body, headers):
        assert "A) world, B) sports, C) business" in asked(body)
        assert body["logprobs"] and body["top_logprobs"] == 20
        others = {"B": 0.5, " b": 0.1, "A": 0.2, "Z": 0.1, "sports": 0.05}
        top = [{"token": token, "logprob": float(np.log(p))} for token, p in others.items()]
        first = {"token": "\n", "logprob": -0.1, "top_logprobs": top[2:]}
        token = {"token": "B", "logprob": -0.7, "top_logprobs": top}
        return answer("B", logprobs={"content": [first, token]})

    data = text_data(3)
    run(data, tmp_path, serve(behave), logprobs=True)
    labels, probs = pseudolabel.read_labels(tmp_path / "labels.jsonl", data, "train")
    assert labels.tolist() == [1, 1, 1]
    assert probs[0] == pytest.approx([0.25, 0.75, 0], abs=1e-4)  # 0.2, 0.5 + 0.1, 0 of 0.8


TOKEN = {"token": "C", "logprob": -0.1, "top_logprobs": []}


@pytest.mark.parametrize("logprobs", [None, {"content": [TOKEN]}, {"content": [{}]}, ["C"]])
def test_without_token_probabilities_the_letter_is_the_label(serve, tmp_path, logprobs):
    url = serve(lambda body, headers: answer("(C)", logprobs=logprobs))
    result = run(text_data(2), tmp_path, url, logprobs=True)
    assert counts(tmp_path)["business"] == 2 and '"probs"' not in open(result["path"]).read()


def test_options_that_are_refused_are_left_out_from_then_on(serve, tmp_path):
    """max_tokens, temperature: each is refused once, not once an example."""
    refused = []

    def behave(body, headers):
        for name in ("max_tokens", "temperature"):
            if name in body:
                refused.append(name)
                return error(400, f"Unsupported: '{name}'. Use 'max_completion_tokens' instead.")
        assert body["max_completion_tokens"] == 7
        return answer('{"label": "sports"}')

    run(text_data(40), tmp_path, serve(behave), max_tokens=7, concurrency=8)
    assert sorted(refused) == ["max_tokens", "temperature"]
    assert counts(tmp_path)["sports"] == 40


def test_an_extra_body_goes_with_every_request_and_into_the_header(serve, tmp_path):
    extra, form = '{"temperature": 1, "response_format": {"type": "json_object"}}', []

    def behave(body, headers):
        form.append((body["temperature"], body["response_format"]["type"], body["max_tokens"]))
        return answer('{"label":\n"business"}')

    run(text_data(2), tmp_path, serve(behave), extra_body=extra)
    assert counts(tmp_path)["business"] == 2 and form == [(1, "json_object", 32)] * 2
    assert read_rows(tmp_path / "labels.jsonl")[0]["settings"]["extra_body"] == extra
    with pytest.raises(common.UserError, match="made for settings"):
        run(text_data(2), tmp_path, serve(behave))


def test_labels_are_made_outside_the_main_thread_too(serve, tmp_path):
    """Only the main thread may set what a signal does."""
    url = serve(lambda body, headers: answer("world"))
    child = threading.Thread(target=run, args=(text_data(3), tmp_path, url))
    child.start()
    child.join()
    assert counts(tmp_path)["world"] == 3


# ---------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("trouble", [error(503, "busy"), b'{"choices": [', (200, {}, b"[]"), 1.5])
def test_passing_trouble_is_asked_again(serve, tmp_path, trouble):
    count = Counter()

    def behave(body, headers):
        count[number(body)] += 1
        return trouble if count[number(body)] < 3 else answer("sports")

    run(text_data(3), tmp_path, serve(behave), timeout=0.7)
    assert counts(tmp_path)["sports"] == 3 and count == {0: 3, 1: 3, 2: 3}


def test_retry_after_is_waited_for(serve, tmp_path):
    times = []

    def behave(body, headers):
        times.append(time.time())
        return error(429, "slow", {"Retry-After": "1"}) if len(times) == 1 else answer("world")

    run(text_data(1), tmp_path, serve(behave))
    assert times[1] - times[0] >= 0.95


@pytest.mark.parametrize(
    "end, message",
    [
        (error(401, "wrong key"), "status 401.*wrong key.*--key-variable.*is saved"),
        (error(307, "elsewhere", {"Location": "http://127.0.0.1:9/v1"}), "status 307.*127.0.0.1:9"),
        (error(404, "no such model"), "127.0.0.1.*/v1/chat/completions: status 404.*no such model"),
    ],
)
def test_lasting_trouble_stops_at_once_with_everything_saved(serve, tmp_path, end, message):
    """The sixth example is refused; the others in flight are kept, and no more are asked."""
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


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "no " * 200, code="content_filter"),
        error(400, "Content Exists Risk"),
        error(403, "flagged"),
        error(413, "too large"),
        error(400, VLLM),
        error(400, "max_tokens must be at least 1, got -73"),
        error(500, "Context size has been exceeded."),
        (200, {}, b'{"choices": []}'),
    ],
)
@pytest.mark.parametrize("which", [0, 3, 5])
def test_a_refused_text_is_an_abstention_and_the_run_goes_on(serve, tmp_path, refusal, which):
    """Wherever it is, even first or last; the options of the others stay."""
    options = []

    def behave(body, headers):
        if number(body) == which:
            return refusal
        options.append(body.keys() - {"model", "messages"})
        return answer("world")

    url = serve(behave)
    assert run(text_data(6), tmp_path, url)["abstentions"] == 1
    row = rows_in(tmp_path)[which]
    assert row["label"] is None and refusal[2].decode()[:50] in row["raw"]
    assert options == [{"temperature", "max_tokens"}] * 5
    assert run(text_data(6), tmp_path, url)["labeled"] == 6 and len(options) == 5


@pytest.mark.parametrize("status", [400, 403, 422])
def test_refusals_of_all_first_rows_stop_with_the_servers_words(serve, tmp_path, status):
    seen = []
    url = serve(lambda body, _: seen.append(body) or error(status, "unknown model m"))
    for session in (1, 2):  # the second one begins with other rows: nothing is final
        with pytest.raises(common.UserError, match=f"status {status}.*unknown model m"):
            run(text_data(50), tmp_path, url)
        assert len(seen) == 3 * session and not rows_in(tmp_path)


def test_refusals_of_many_rows_in_a_row_stop_the_run_and_none_of_them_is_final(serve, tmp_path):
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        return answer("world") if len(seen) < 10 else error(403, "not any more")

    with pytest.raises(common.UserError, match="no answer to the last rows.*not any more"):
        run(text_data(500), tmp_path, serve(behave), concurrency=1)
    assert len(seen) == 9 + pseudolabel.IN_A_ROW and len(rows_in(tmp_path)) == 9


def test_a_row_without_a_usable_reply_ends_as_null_in_its_second_run(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudolabel, "ATTEMPTS", 2)
    broken = {4, 5}
    url = serve(lambda body, _: error(500, "no") if number(body) in broken else answer("world"))
    assert run(text_data(6), tmp_path, url)["labeled"] == 4
    with pytest.raises(common.UserError, match="2 of 6 examples have no label yet"):
        pseudolabel.read_labels(tmp_path / "labels.jsonl", text_data(6), "train")
    broken.remove(4)
    assert run(text_data(6), tmp_path, url)["labeled"] == 6
    labels, _ = pseudolabel.read_labels(tmp_path / "labels.jsonl", text_data(6), "train")
    assert labels.tolist() == [0, 0, 0, 0, 0, -1] and "status 500" in rows_in(tmp_path)[5]["raw"]


def test_a_teacher_that_answered_nothing_is_one_clear_line(serve, tmp_path):
    result = run(text_data(3), tmp_path, serve(lambda body, _: answer("I cannot say")))
    assert result["abstentions"] == 3
    with pytest.raises(common.UserError, match="the teacher answered nothing"):
        pseudolabel.read_labels(result["path"], text_data(3), "train")


@pytest.mark.parametrize(
    "reply",
    [
        message(content=None, reasoning_content="The text could be"),
        answer(None, finish_reason="length"),
        answer("<think>The text could be", finish_reason="length"),
        answer("Let me think about this", finish_reason="length"),
    ],
)
def test_a_reasoning_model_without_room_stops_early_and_nothing_is_final(serve, tmp_path, reply):
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        return answer("sports") if body["max_tokens"] > 100 else reply

    url = serve(behave)
    with pytest.raises(common.UserError, match="--max-tokens"):
        run(text_data(60), tmp_path, url)
    assert len(seen) == 3 and not rows_in(tmp_path)
    run(text_data(60), tmp_path, url, max_tokens=2000)
    assert counts(tmp_path)["sports"] == 60


def test_a_resumed_run_does_not_wait_long_for_a_server_that_is_down(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudolabel, "PAUSE", 0)
    seen = []
    run(text_data(300), tmp_path, serve(lambda body, _: answer("world")), dry_run=3)
    url = serve(lambda body, _: seen.append(body) or error(503, "busy"))
    with pytest.raises(common.UserError, match="no answer to the last rows: status 503.*busy"):
        run(text_data(300), tmp_path, url)
    assert len(seen) == 4 * pseudolabel.ATTEMPTS


def test_one_long_thought_is_asked_again_by_the_next_run(serve, tmp_path):
    thought = {7}
    long = answer(None, (100, 32), finish_reason="length")
    url = serve(lambda body, _: long if number(body) in thought else answer("world"))
    result = run(text_data(12), tmp_path, url)
    assert result["labeled"] == 11 and result["tokens"] == [1200, 22 + 32]
    thought.clear()
    assert run(text_data(12), tmp_path, url)["labeled"] == 12


def test_an_endpoint_that_is_down_stops_the_run(tmp_path, monkeypatch, serve, capsys):
    monkeypatch.setattr(pseudolabel, "ATTEMPTS", 2)
    with pytest.raises(common.UserError, match="no reply: .*refused.*--base-url"):
        run(text_data(500), tmp_path, "http://127.0.0.1:9/v1")
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        return answer("world") if len(seen) < 5 else error(500, "out of memory")

    with pytest.raises(common.UserError, match="no answer to the last rows.*500.*out of memory"):
        run(text_data(500), tmp_path, serve(behave), concurrency=4)
    assert len(seen) < 70 and "asking again, status 500: " in capsys.readouterr().out


# ---------------------------------------------------------------------------- money


def test_labeled_rows_are_asked_first_and_a_dry_run_tells_how_good_the_teacher_is(
    serve, tmp_path, capsys
):
    """8 of 10 labeled rows are right, one of world is wrong, one of sports has no answer."""
    data, seen, known = text_data(100), [], range(5, 100, 10)
    data.train.y[known] = [0, 1] * 5

    def behave(body, headers):
        seen.append(i := number(body))
        said = {5: "business", 15: "I do not know"}
        return answer(said.get(i) or CLASSES[max(0, data.train.y[i])])

    url = serve(behave)
    result = run(data, tmp_path, url, dry_run=20, price_in=1, price_out=1, concurrency=1)
    assert sorted(seen[:10]) == list(known) and len(seen) == 20
    said = capsys.readouterr().out
    assert result["accuracy"] == 80 and "80.00 % (95 % interval 49.02 to 94.33) of 10" in said
    assert re.search(r"\n +world +1.00 +0.80 +0.89 +5\n +sports +1.00 +0.80 ", said)
    assert "\n1 of world taken for business" in said
    assert "1 abstentions (5.0%)" in said and "estimate for all 100: 10000 tokens in" in said
    assert len(said.splitlines()) < 30
    run(data, tmp_path, url)
    assert sorted(seen) == list(range(100))


JUNK = [None, [], {}, "", 0, -1, 1.5, True, "9", 1e400, float("nan"), 10**30, [1], {"text": "a"}]


def junk(rng, reply, depth=0):
    """A reply with some of its values replaced at random by anything JSON can hold."""
    if rng.random() < 0.08 or depth > 6:
        return rng.choice(JUNK)
    if isinstance(reply, dict):
        return {key: junk(rng, value, depth + 1) for key, value in reply.items()}
    return [junk(rng, one, depth + 1) for one in reply] if isinstance(reply, list) else reply


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_server_replies_the_file_is_readable_and_no_answer_is_asked_again(
    serve, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(pseudolabel, "ATTEMPTS", 2)
    monkeypatch.setattr(pseudolabel, "PAUSE", 0)
    rng, lock, asked_for = random.Random(seed), threading.Lock(), []
    top = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -3}]
    token = {"token": "A", "logprob": -0.1, "top_logprobs": top}
    whole = {
        "choices": [{
            "message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": [token]},
        }],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
    }  # fmt: skip

    def behave(body, headers):
        with lock:
            asked_for.append(number(body))
            status = rng.choice([200] * 20 + [400, 403, 413, 422, 429, 500, 503])
            return status, {}, json.dumps(junk(rng, whole)).encode()

    url, path, data = serve(behave), tmp_path / "labels.jsonl", text_data(60)
    for _ in range(12):
        before, start = set(rows_in(tmp_path)) if path.exists() else set(), len(asked_for)
        try:
            run(data, tmp_path, url, logprobs=True, concurrency=8)
        except common.UserError as error:
            assert "\n" not in " ".join(str(error).split())
        assert not before & set(asked_for[start:])
        pseudolabel.collect(path, read_rows(path)[1], 60, 3)  # raises if a row is not valid
        if len(rows_in(tmp_path)) == 60:
            break
    labels, _ = pseudolabel.read_labels(path, data, "train")
    assert (labels == 0).sum() > 30


def test_a_dry_run_asks_few_keeps_their_answers_and_estimates(serve, tmp_path, capsys):
    seen = []

    def behave(body, headers):
        seen.append(number(body))
        return answer("world", usage=(1000, 10))

    url = serve(behave)
    run(text_data(100), tmp_path, url, dry_run=5, price_in=1, price_out=1)
    assert len(seen) == 5 and max(seen) - min(seen) > 20  # a sample of the whole part
    estimate = "estimate for all 100: 100000 tokens in, 1000 out, cost 0.1010"
    assert estimate in capsys.readouterr().out
    run(text_data(100), tmp_path, url)
    assert sorted(seen) == list(range(100))


def test_the_cost_stays_below_its_limit_over_several_runs(serve, tmp_path):
    calls, price = [], (1000 * 10 + 32 * 10) / 1e6  # 0.01032 each

    def behave(body, headers):
        calls.append(1)
        time.sleep(0.02)
        return answer("world", usage=(1000, 32))

    url = serve(behave)
    for limit in (0.055, 0.1, 0.3, 0.3):  # the last run asks nothing
        result = run(text_data(100), tmp_path, url, price_in=10, price_out=10, max_cost=limit)
        assert limit - 1.001 * price < result["cost"] <= limit
    assert len(calls) == 29


def test_tokens_of_unusable_replies_are_added_up(serve, tmp_path):
    """The first reply to each has no choices but is billed; the last example never gets one."""
    count = Counter()
    nothing = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})

    def behave(body, headers):
        count[number(body)] += 1
        unusable = count[number(body)] == 1 or number(body) == 2
        return (200, {}, nothing.encode()) if unusable else answer("world", usage=(10, 1))

    result = run(text_data(3), tmp_path, serve(behave), concurrency=1)
    assert result["labeled"] == 3 and result["tokens"] == [2 * 17 + 2 * 7, 4 + 2]
    rows = read_rows(tmp_path / "labels.jsonl")[1]
    assert sum(row.keys() == {"usage"} for row in rows) == 3


def test_max_cost_without_usage_in_the_replies_still_stops(serve, tmp_path):
    calls = []

    def behave(body, headers):
        calls.append(1)
        return answer("world", usage=(1000, 32) if len(calls) == 1 else None)

    run(text_data(100), tmp_path, serve(behave), price_in=10, price_out=10, max_cost=0.055)
    assert len(calls) == 5  # each is taken to cost as much as the dearest


# ---------------------------------------------------------------------------- the key


def test_the_key_is_in_no_file_and_no_output(tmp_path, serve):
    """The server sees it and returns it in answers and errors."""
    keys = []

    def behave(body, headers):
        keys.append(headers["Authorization"])
        if len(keys) == 5:
            return error(401, f"{'x' * 268} {headers['Authorization']}")  # cut within the key
        failed = error(500, f"failed for {headers['Authorization']}")
        return answer(f"world {KEY}") if len(keys) % 2 else failed

    command = [sys.executable, pseudolabel.__file__, "--teacher", "chat", "--model", "m"]
    command += ["--base-url", serve(behave), "--key-variable", "MY_KEY", "--concurrency", "1"]
    place = {"cwd": tmp_path, "env": {**os.environ, "MY_KEY": KEY + "\n"}}
    done = subprocess.run(command, capture_output=True, text=True, **place)
    assert done.returncode == 2 and set(keys) == {f"Bearer {KEY}"} and len(keys) == 5
    assert re.search(r"error: .*status 401.*xxx", done.stderr) and "Traceback" not in done.stderr
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "world [key]" in file.read_text()
    assert not any(KEY[:5] in text for text in [done.stdout, done.stderr, file.read_text()])


def test_a_missing_or_unprintable_key_is_one_line_without_it(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(common.UserError, match="OPENAI_API_KEY: expected the API key for api.open"):
        pseudolabel.connect(Args(model="m"))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Header: 1")
    with pytest.raises(common.UserError) as caught:
        pseudolabel.connect(Args(model="m"))
    assert KEY not in str(caught.value)
    with pytest.raises(common.UserError, match="--base-url file"):
        pseudolabel.connect(Args(model="m", base_url="file:///etc"))


@pytest.mark.parametrize("end", ["", "/", "/?api-version=2024-10-21"])
def test_another_header_has_the_key_and_a_query_stays_last(serve, tmp_path, monkeypatch, end):
    """As Azure wants it; the key is in no file, no error and no output."""
    seen = []
    monkeypatch.setenv("AZURE_KEY", KEY)

    def behave(body, headers):
        seen.append((headers["Asked-For"], headers["api-key"], headers["Authorization"]))
        return answer(f"world {KEY}") if len(seen) < 3 else error(401, f"{KEY} is wrong")

    url = serve(behave) + end
    with pytest.raises(common.UserError, match="is wrong") as caught:
        run(text_data(5), tmp_path, url, header="api-key=AZURE_KEY", concurrency=1)
    assert KEY not in str(caught.value) and KEY not in (tmp_path / "labels.jsonl").read_text()
    path = f"/v1/chat/completions{end.strip('/')}"
    assert seen == [(path, KEY, None)] * 3
    header = read_rows(tmp_path / "labels.jsonl")[0]
    assert "AZURE" not in json.dumps(header) and "version" not in json.dumps(header)


@pytest.mark.parametrize("header", ["api-key: sk-1", "api-key=sk-1", "api-key", f"api-key={KEY}"])
def test_a_header_without_a_variable_is_one_line_without_the_key(serve, tmp_path, header):
    with pytest.raises(common.UserError, match="environment variable of --header N") as caught:
        run(text_data(1), tmp_path, serve(lambda body, headers: answer("world")), header=header)
    assert "sk-" not in str(caught.value)


# ---------------------------------------------------------------------------- killed and stopped


def misbehaving(log, index_of, y):
    """30 % of the replies are trouble; every request and what became of it goes to `log`."""

    def behave(body, headers):
        index = index_of[body["messages"][0]["content"][1]["image_url"]["url"]]
        kinds = ["429", "500", "hang", "cut", "JSON", "wrong"]
        kind = random.choice(kinds) if random.random() < 0.3 else "right"
        with open(log, "a") as file:
            file.write(json.dumps([index, kind in ("right", "wrong")]) + "\n")
        return {
            "429": error(429, "slow down", {"Retry-After": "1"}), "500": error(500, "oops"),
            "hang": 3.0, "cut": answer("5")[2][:30], "JSON": (200, {}, b'{"choices": [{"text"'),
            "wrong": answer("a banana"), "right": answer(f"It is a {y[index]}."),
        }[kind]  # fmt: skip

    return behave


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


def test_kills_lose_no_answer_and_pay_none_twice_beyond_what_was_in_flight(tmp_path, forked):
    data, path, log = common.load_data("digits", ""), tmp_path / "labels.jsonl", tmp_path / "log"
    sent = [pseudolabel.body_of(data.test, i, "", {}, Args(image_size=16)) for i in range(500)]
    sent = [body["messages"][0]["content"][1]["image_url"]["url"] for body in sent]
    index_of, at_once = {url: i for i, url in enumerate(sent)}, 12
    assert len(index_of) == 500
    url = forked(misbehaving(log, index_of, data.test.y))
    args = Args(
        split="test", teacher="chat", model="m", base_url=url, concurrency=at_once, timeout=1.0,
        image_size=16, output=str(path),
    )  # fmt: skip
    log.touch()
    kills, paid_in_all, end, after = 0, 0, time.time() + 200, set()
    while len(after) < 500:  # on a busy machine, a killed run's lock may outlive it for a while
        assert time.time() < end
        before, logged = set(whole_indices(path)), log.stat().st_size
        child, deadline = quietly(pseudolabel.label, data, args), time.time() + 60
        enough = min(495, len(before) + 160)
        while kills < 2 and child.is_alive() and len(whole_indices(path)) < enough:
            assert time.time() < deadline
            time.sleep(0.002)
        if kills < 2:
            kills += child.is_alive()
            child.kill()
        child.join(120)
        time.sleep(0.1)  # requests on their way to the server are logged
        after = set(whole_indices(path))
        requests = [json.loads(line) for line in log.read_bytes()[logged:].splitlines()]
        paid = [index for index, was_paid in requests if was_paid]
        assert not before & {index for index, _ in requests}, "asked again despite an answer"
        assert after - before <= set(paid) and before <= after
        assert len(paid) - len(after - before) <= at_once, "more lost than was in flight"
        paid_in_all += len(paid)
    assert kills == 2 and 500 <= paid_in_all <= 500 + 2 * at_once
    assert sorted(whole_indices(path)) == list(range(500))  # each exactly once
    labels, _ = pseudolabel.read_labels(path, data, "test")
    right = {row["index"]: "It is" in row["raw"] for row in read_rows(path)[1] if "index" in row}
    assert all(labels[i] == (data.test.y[i] if right[i] else -1) for i in range(500))
    assert 5 < (labels == -1).sum() < 100


@pytest.mark.parametrize("number_of_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_summary_and_the_answers_in_flight(
    tmp_path, forked, number_of_signal
):
    asked_for, path, output = fork.Value("i", 0), tmp_path / "labels.jsonl", tmp_path / "output"

    def behave(body, headers):
        with asked_for.get_lock():
            asked_for.value += 1
        time.sleep(0.3)
        return answer("3")

    url = forked(behave)

    def child():
        sys.stdout = sys.stderr = open(output, "w", buffering=1)
        sys.argv = f"pseudolabel.py --split test --teacher chat --model m --output {path}".split()
        sys.argv += ["--concurrency", "8", "--base-url", url]
        common.cli(Args, pseudolabel.main)

    process, deadline = fork.Process(target=child, daemon=True), time.time() + 60
    process.start()
    while len(whole_indices(path)) < 12:
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number_of_signal)
    process.join(20)
    assert process.exitcode == 130
    rows = whole_indices(path)
    assert len(rows) == len(set(rows)) == asked_for.value < 60  # whatever was asked was kept
    text = output.read_text()
    assert f"{len(rows)} of 500 labeled" in text and "Traceback" not in text


def test_requests_run_in_parallel(forked, monkeypatch):
    """After the first answer 64 are open at once: the server answers none before it has 64."""
    monkeypatch.setattr(pseudolabel, "PAUSE", 0.001)  # where it fails, it fails soon
    number, together = itertools.count(), threading.Barrier(64)

    def reply(body, headers):
        if next(number):  # the first goes alone
            together.wait(timeout=10)
        return answer("sports")

    args = Args(teacher="chat", model="m", base_url=forked(reply), concurrency=64)
    args.prompt, args.max_cost = "Topic of {text}? {options}", float("inf")
    rows = pseudolabel.label_with_chat(text_data(129).train, CLASSES, list(range(129)), args)
    assert [row["label"] for row in rows] == [CLASSES.index("sports")] * 129
