"""Requests and answers in files, in the format of OpenAI's batch API and of vLLM's run-batch."""

import json
import random

import numpy as np
import pytest
from PIL import Image
from test_chat import CLASSES, JUNK, answer, counts, junk, number, rows_in, run, serve, text_data

import common
import pseudolabel
from pseudolabel import Args, read_rows

__all__ = ["serve"]  # a fixture
NOWHERE = "http://127.0.0.1:9/v1"  # asking it would fail


def write(data, tmp_path, **changes):
    """The requests of --batch-file."""
    path = tmp_path / "requests.jsonl"
    path.unlink(missing_ok=True)
    run(data, tmp_path, NOWHERE, batch_file=str(path), **changes)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read(data, tmp_path, lines, **changes):
    """Summary of the label file with the answers of these lines (bytes: as they are)."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / "answers.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return run(data, tmp_path, NOWHERE, batch_results=str(tmp_path / "answers.jsonl"), **changes)


def line_of(index, reply=None, error=None, **more):
    """A line of a provider's output or error file."""
    line = {"id": "batch_req_1", "custom_id": str(index), "response": None, "error": error}
    if reply:
        status, _, body = reply
        line["response"] = {"status_code": status, "request_id": "r", "body": json.loads(body)}
    return line | more


def refusal(status, message="no"):
    return status, {}, json.dumps({"error": {"message": message}}).encode()


EXPIRED = {"code": "batch_expired", "message": "This request could not be executed in time."}


def test_requests_of_open_rows_are_written_and_their_answers_join_the_label_file(serve, tmp_path):
    """Some rows online, then two batches, then the rest online: each row once, the tokens added."""
    data, asked_for = text_data(20), []
    url = serve(lambda body, _: asked_for.append(body) or answer("world"))
    run(data, tmp_path, url, dry_run=5)
    first = write(data, tmp_path)
    done = set(rows_in(tmp_path))
    assert sorted(int(line["custom_id"]) for line in first) == sorted({*range(20)} - done)
    for line in first:
        assert line.keys() == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert number(line["body"]) == int(line["custom_id"])
    body, online = first[0]["body"], asked_for[0]
    assert body["max_completion_tokens"] == online["max_tokens"] == 32
    shared = body.keys() - {"max_completion_tokens", "messages"}
    assert online.keys() - {"max_tokens", "messages"} == shared == {"model", "temperature"}
    assert "world, sports, business" in body["messages"][0]["content"]

    lines = [line_of(line["custom_id"], answer("sports")) for line in first[:9]]
    result = read(data, tmp_path, lines)
    assert result["labeled"] == 14 and counts(tmp_path) == {"world": 5, "sports": 9}
    assert result["tokens"] == [14 * 100, 14 * 2] and "Authorization" not in str(first)
    second = write(data, tmp_path)
    assert [line["custom_id"] for line in second] == [line["custom_id"] for line in first[9:]]
    read(data, tmp_path, [line_of(line["custom_id"], answer("business")) for line in second[:3]])
    assert run(data, tmp_path, url)["labeled"] == 20 and len(asked_for) == 5 + 3
    rows = read_rows(tmp_path / "labels.jsonl")[1]
    assert sorted(row["index"] for row in rows if "label" in row) == list(range(20))
    assert counts(tmp_path) == {"world": 8, "sports": 9, "business": 3}
    labels, _ = pseudolabel.read_labels(tmp_path / "labels.jsonl", data, "train")
    assert labels[int(first[0]["custom_id"])] == 1 and write(data, tmp_path) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(extra_body='{"temperature": 1}'), "made for settings"),
        (dict(model="other"), "made for model"),
        (dict(), "made for fingerprint"),
    ],
)
def test_answers_to_other_requests_are_refused(tmp_path, changes, message):
    """Although the label file has no label yet."""
    data = text_data(4)
    write(data, tmp_path)
    before = (tmp_path / "labels.jsonl").read_bytes()
    if not changes:
        data.train.x = data.train.x[::-1].copy()
    with pytest.raises(common.UserError, match=message):
        read(data, tmp_path, [line_of(0, answer("world"))], **changes)
    assert (tmp_path / "labels.jsonl").read_bytes() == before


def test_lines_that_cannot_be_used_are_counted_in_one_line(tmp_path, capsys):
    lines = [
        line_of(1, answer("world")), line_of(3, answer("I do not know")),
        b"{", b"[1]", b"\xff\xfe", b'{"response": {}}', b"", b"  ", b'"3"', b"null",
        line_of(99, answer("world")), line_of("a", answer("world")), line_of(1, answer("sports")),
        line_of(5, error=EXPIRED), line_of(6, error=EXPIRED), line_of(7, (500, {}, b'"oops"')),
    ]  # fmt: skip
    result = read(text_data(8), tmp_path, lines)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "answers.jsonl" in line]
    assert "2 are replies; 6 cannot be read; 3 have no custom_id that is open; 2 have no" in said
    assert "batch_expired" in said and "1 have no answer, but \"oops\"" in said
    assert result["labeled"] == 2 and result["abstentions"] == 1
    assert rows_in(tmp_path).keys() == {1, 3} and rows_in(tmp_path)[1]["label"] == 0
    assert {int(line["custom_id"]) for line in write(text_data(8), tmp_path)} == {0, 2, 4, 5, 6, 7}


def test_a_file_without_a_single_reply_is_one_clear_line(tmp_path):
    for lines in ([line_of(0, error=EXPIRED)], [b"{"], []):
        with pytest.raises(common.UserError, match="no replies among its lines") as caught:
            read(text_data(3), tmp_path, lines)
        assert "\n" not in str(caught.value) and not rows_in(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        run(text_data(3), tmp_path, NOWHERE, batch_results=str(tmp_path / "nowhere"))


def test_refused_rows_are_null_once_any_row_was_answered(tmp_path):
    """The output file comes first, then the error file; vLLM has the reason beside the response."""
    data, vllm = text_data(60), line_of(9, error={"message": "too long"})
    vllm["response"] = {"status_code": 400, "request_id": "r", "body": None}
    refused = [line_of(i, refusal(400, "content filter")) for i in range(10, 60)]
    with pytest.raises(common.UserError, match="no answer to the last rows: status 400.*content f"):
        read(data, tmp_path, refused)  # perhaps it is the request that is wrong
    assert not rows_in(tmp_path)
    read(data, tmp_path, [line_of(i, answer("world")) for i in range(9)])
    result = read(data, tmp_path, [vllm, *refused])
    assert result["labeled"] == 60 and result["abstentions"] == 51
    rows = rows_in(tmp_path)
    assert "content filter" in rows[30]["raw"] and "too long" in rows[9]["raw"]


def test_refused_rows_beside_answered_ones_are_null_wherever_they_are(tmp_path):
    refused = [line_of(i, refusal(400, "filter")) for i in range(0, 60, 2)]
    answered = [line_of(i, answer("world")) for i in range(1, 60, 2)]
    for lines in (refused + answered, answered + refused):
        (tmp_path / "labels.jsonl").unlink(missing_ok=True)
        result = read(text_data(60), tmp_path, lines)
        assert result["labeled"] == 60 and result["abstentions"] == 30


def test_an_answer_that_was_cut_is_asked_for_once_more(tmp_path):
    cut, data = answer(None, (100, 32), finish_reason="length"), text_data(3)
    lines = [line_of(0, answer("world")), line_of(1, answer("sports")), line_of(2, cut)]
    result = read(data, tmp_path, lines)
    assert result["labeled"] == 2 and result["tokens"] == [300, 36]
    assert [line["custom_id"] for line in write(data, tmp_path, max_tokens=99)] == ["2"]
    result = read(data, tmp_path, [line_of(2, cut)])
    assert result["labeled"] == 3 and rows_in(tmp_path)[2]["label"] is None
    assert result["tokens"] == [400, 68]


def test_an_empty_or_odd_answer_is_billed_once(tmp_path):
    """Online, both would be asked for again."""
    lines = [line_of(0, answer("world")), line_of(1, answer("")), line_of(2, answer(7))]
    result = read(text_data(3), tmp_path, lines)
    assert result["tokens"] == [300, 6] and result["labeled"] == 2 and result["abstentions"] == 1


def test_answers_are_read_whatever_they_cost(tmp_path):
    """They are paid for; --max-cost ends requests, which a file does not make."""
    lines = [line_of(i, answer("world", (1000, 10))) for i in range(40)]
    prices = {"price_in": 1000, "price_out": 1000, "max_cost": 0.5}
    result = read(text_data(40), tmp_path, lines, **prices)
    assert result["labeled"] == 40 and result["cost"] == pytest.approx(40 * 1.01)


def test_letters_and_pictures_go_into_the_file_too(tmp_path):
    (tmp_path / "photo.jpg").parent.mkdir(exist_ok=True)
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "photo.jpg")
    files = np.array([str(tmp_path / "photo.jpg")])
    part = common.Split(np.zeros((1, 3, 8, 8), np.uint8), np.array([-1]), files)
    data = common.Data("pictures", CLASSES, part, None)
    (line,) = write(data, tmp_path, logprobs=True)
    text, picture = line["body"]["messages"][0]["content"]
    assert "A) world, B) sports" in text["text"] and line["body"]["top_logprobs"] == 20
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    token = {"token": "B", "logprob": -0.1, "top_logprobs": [{"token": "B", "logprob": -0.1}]}
    reply = answer("B", logprobs={"content": [token]})
    path = read(data, tmp_path, [line_of(0, reply)], logprobs=True)["path"]
    assert sum('"probs"' in line for line in open(path)) == 1
    assert counts(tmp_path) == {"sports": 1}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_lines_hold_the_label_file_stays_readable(tmp_path, seed):
    rng, data = random.Random(seed), text_data(30)
    for _ in range(6):
        lines = [junk(rng, line_of(i, answer("sports"))) for i in range(30)]
        lines += [rng.choice(JUNK), rng.randbytes(20)]
        rng.shuffle(lines)
        try:
            read(data, tmp_path, lines)
        except common.UserError as error:
            assert "\n" not in " ".join(str(error).split())
        pseudolabel.collect(tmp_path, read_rows(tmp_path / "labels.jsonl")[1], 30, 3)
    right = [row["label"] == 1 for row in rows_in(tmp_path).values()]
    assert len(right) > 25 and sum(right) > 10


@pytest.mark.parametrize(
    "changes",
    [
        dict(teacher="text", batch_file="r"),
        dict(teacher="text", batch_results="r"),
        dict(teacher="chat", model="m", batch_file="r", batch_results="a"),
    ],
)
def test_one_of_them_at_a_time_and_with_the_chat_teacher(tmp_path, changes):
    with pytest.raises(common.UserError, match="--batch-results: take one, with --teacher chat"):
        pseudolabel.label(text_data(2), Args(output=str(tmp_path / "o"), **changes))
