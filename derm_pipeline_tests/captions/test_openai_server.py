"""A captioner behind a server: a real HTTP server on loopback that answers, throttles, hangs up and talks nonsense."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from derm_pipeline.captions.claims import Facts
from derm_pipeline.captions.gate import Gate
from derm_pipeline.captions.openai_server import OpenAiCaptioner, OpenAiConfig, read_answer
from derm_pipeline.captions.prompted import PromptedConfig
from derm_pipeline.captions.prompts import Answer, Question, make_prompt
from derm_pipeline.captions.symptoms import ImageToCaption, describe_all
from derm_pipeline.images import decode, encode_png
from derm_pipeline.records import Modality

pytest.importorskip("openai")

PROMPT = make_prompt(Modality.CLINICAL, "psoriasis")


def completion(text, finish="stop"):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def recorded(seed):
    return f"A clinical image of psoriasis. Plaque {seed} is red, raised and scaly, with a sharp edge on pale skin."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, self.headers, body))
            number = server.tries[body["seed"]]
            server.tries[body["seed"]] += 1
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            server.react(self, body, number)
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(react):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.react, server.lock = react, threading.Lock()
    server.requests, server.tries, server.under_way, server.most_under_way = [], Counter(), 0, 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def answering(handler, body, _):
    handler.reply(completion(recorded(body["seed"])))


def captioner(url, api_key=None, **settings):
    usual = {"base_url": url, "model": "tiny", "max_retries": 4, "timeout_s": 60, "batch_size": 4}
    return OpenAiCaptioner(OpenAiConfig(**(usual | settings)), api_key=api_key)


def questions(count=3):
    rng = np.random.default_rng()
    return [Question(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), PROMPT, seed) for seed in range(count)]


@pytest.fixture
def items(tmp_path):
    rng = np.random.default_rng()
    found = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encode_png(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(ImageToCaption(path, digest, Facts(Modality.CLINICAL), "psoriasis"))
    return found


def test_a_question_is_sent_whole_and_the_answer_read():
    with serving(answering) as server:
        asked = questions(3)
        one = captioner(server.url, top_k=7, api_key_env="SOME_KEY", api_key="secret", max_pixels=600)
        answers = one.answer(asked)
    assert answers == [Answer(recorded(seed), is_complete=True) for seed in range(3)]
    path, headers, body = min(server.requests, key=lambda request: request[2]["seed"])
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["seed"], body["max_tokens"], body["temperature"]) == ("tiny", 0, 150, 0.8)
    assert (body["top_p"], body["top_k"]) == (0.9, 7)
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": PROMPT.text}
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert decode(base64.b64decode(data)).shape == (20, 30, 3)


def test_what_the_environment_says_of_another_server_is_not_sent(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with serving(answering) as server:
        captioner(server.url).answer(questions(1))
    assert "private" not in str(server.requests[0][1])


def test_several_questions_are_under_way_at_once_but_no_more_than_set():
    def slow(handler, body, number):
        time.sleep(0.1)
        answering(handler, body, number)

    with serving(slow) as server:
        captioner(server.url, concurrency=3).answer(questions(9))
        assert server.most_under_way == 3


def faulty(handler, body, number):
    """Each image's first requests fail in some way, and sooner or later it is answered."""
    kind = body["seed"] % 5
    if number == 0 and kind == 0:
        handler.reply({"error": "slow down"}, 429, Retry_After="0.05")
    elif number == 0 and kind == 1:
        handler.reply({"error": "oops"}, 503, Retry_After="0.05")
    elif number == 0 and kind == 2:
        time.sleep(0.8)
        handler.hang_up()
    elif number == 0 and kind == 3:
        handler.hang_up()
    else:
        answering(handler, body, number)


def test_throttling_timeouts_and_broken_connections_leave_no_trace_in_the_table(items, tmp_path):
    with serving(answering) as server:
        smooth = describe_all(items, captioner(server.url), Gate(), work=tmp_path / "smooth")
    with serving(faulty) as server:
        rough = describe_all(items, captioner(server.url, timeout_s=0.4), Gate(), work=tmp_path / "rough")
        assert max(server.tries.values()) == 2
    assert rough.equals(smooth)
    assert set(rough["verdict"].to_pylist()) == {"accepted"}
    assert set(rough["attempts"].to_pylist()) == {1}


def test_retry_after_is_kept_to():
    times = []

    def throttled(handler, body, number):
        times.append(time.monotonic())
        if number == 0:
            handler.reply({}, 429, Retry_After="1")
        else:
            answering(handler, body, number)

    with serving(throttled) as server:
        assert captioner(server.url).answer(questions(1))[0].is_complete
    assert 0.95 <= times[1] - times[0] < 3


MALFORMED = [
    b"not json",
    b"",
    b"{}",
    b'{"choices": []}',
    b'{"choices": null}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}',
    b'{"choices": [{"message": {"content": 7}}]}',
    b'{"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}',
    b"[" * 50_000,
    b"\xff\xfe{",
]


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_response_is_an_empty_answer(body):
    answer = read_answer(body.decode(errors="replace"))
    assert answer.text == ""

    def nonsense_about_the_first(handler, asked, number):
        if asked["messages"][0]["content"][1]["text"] == PROMPT.text:
            handler.reply(body)
        else:
            answering(handler, asked, number)

    with serving(nonsense_about_the_first) as server:
        assert captioner(server.url).answer(questions(1))[0].text == ""


@pytest.mark.parametrize("reply", [(b"<html>log in</html>", 200), (b'{"error": "CUDA error"}', 500)])
def test_a_server_that_answers_nothing_any_more_is_an_error_and_no_table_of_stand_ins(items, tmp_path, reply):
    def failing_later(handler, body, number):
        if len(handler.server.tries) > 4:
            handler.reply(*reply)
        else:
            answering(handler, body, number)

    with serving(failing_later) as server, pytest.raises(ValueError, match="answers no question"):
        describe_all(items, captioner(server.url, max_retries=0), Gate(), work=tmp_path / "work")
    with serving(answering) as server:
        table = describe_all(items, captioner(server.url), Gate(), work=tmp_path / "work")
        assert len(server.requests) == 6
    assert set(table["verdict"].to_pylist()) == {"accepted"}


def test_an_image_that_a_server_cannot_take_is_no_reason_to_stop_when_it_is_asked_about_alone():
    def picky(handler, body, number):
        if body["messages"][0]["content"][1]["text"] == PROMPT.text:
            handler.reply({"error": {"message": "too large"}}, 400)
        else:
            answering(handler, body, number)

    with serving(picky) as server:
        answers = captioner(server.url).answer(questions(2))
    assert [answer.problem.startswith("refused: ") for answer in answers] == [True, True]


def test_the_key_is_in_no_message_even_if_the_server_repeats_it():
    key = f"sk-{np.random.default_rng().integers(10**12)}"
    for status in (400, 401, 404, 503):
        with serving(lambda handler, *_: handler.reply({"error": {"message": f"wrong key {key}"}}, status)) as server:  # noqa: B023  called within the loop
            with pytest.raises((OSError, ValueError)) as caught:
                captioner(server.url, api_key_env="KEY", api_key=key, max_retries=0).answer(questions(1))
            assert "wrong key" in str(caught.value)
            assert key not in "".join(traceback.format_exception(caught.value))


TEXTLESS = [body for body in MALFORMED if b'"content"' in body]


@pytest.mark.parametrize(("bodies", "attempts"), [(sorted(set(MALFORMED) - set(TEXTLESS)), {1}), (TEXTLESS, {2})])
def test_malformed_responses_leave_no_trace_and_textless_ones_are_refused(items, tmp_path, bodies, attempts):
    first = set()

    def nonsense_first(handler, body, number):
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        if image not in first:
            first.add(image)
            handler.reply(bodies[len(first) % len(bodies)])
        else:
            answering(handler, body, number)

    with serving(nonsense_first) as server:
        table = describe_all(items, captioner(server.url), Gate(), work=tmp_path / "work")
    assert set(table["verdict"].to_pylist()) == {"accepted"}
    assert set(table["attempts"].to_pylist()) == attempts
    if attempts == {2}:
        assert all(reasons[0].startswith("empty") for reasons in table["gate_reasons"].to_pylist())
    else:
        with serving(answering) as server:
            assert table.equals(describe_all(items, captioner(server.url), Gate(), work=tmp_path / "smooth"))


def test_the_finish_reason_says_whether_an_answer_is_whole():
    for finish, is_complete in (("stop", True), ("length", False), (None, None)):
        assert read_answer(json.dumps(completion("a lesion", finish))) == Answer("a lesion", is_complete)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "lesion"}]
    assert read_answer(json.dumps(completion(parts))).text == "a lesion"
    assert len(read_answer(json.dumps(completion("x" * 100_000))).text) == 20_000


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, PermissionError, "refuses the key"),
        (403, PermissionError, "refuses the key"),
        (404, ValueError, "does not know the address or the model 'tiny'"),
        (400, ValueError, "answers no question"),
    ],
)
def test_what_no_repetition_mends_stops_at_once(status, kind, message):
    with serving(lambda handler, *_: handler.reply({"error": {"message": "no"}}, status)) as server:
        with pytest.raises(kind, match=message):
            captioner(server.url).answer(questions(1))
        assert len(server.requests) <= 4


def test_one_image_that_a_server_cannot_take_falls_back_and_the_others_go_on(items, tmp_path):
    poison = []

    def picky(handler, body, number):
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        if not poison:
            poison.append(image)
        if image == poison[0]:
            handler.reply({"error": {"message": "image too odd"}}, 400)
        else:
            answering(handler, body, number)

    with serving(picky) as server:
        table = describe_all(items, captioner(server.url), Gate(), work=tmp_path / "work")
    verdicts = table["verdict"].to_pylist()
    assert Counter(verdicts) == {"accepted": 9, "fallback": 1}
    assert "image too odd" in table["gate_reasons"].to_pylist()[verdicts.index("fallback")][0]


def test_a_server_that_stays_busy_or_is_not_there_is_an_error_after_bounded_tries():
    with serving(lambda handler, *_: handler.reply({}, 429, Retry_After="0.01")) as server:
        with pytest.raises(ConnectionError, match="did not answer in 3 tries"):
            captioner(server.url, max_retries=2).answer(questions(1))
        assert len(server.requests) == 3
        url = server.url
    with pytest.raises(ConnectionError, match="did not answer in 1 tries"):
        captioner(url, max_retries=0).answer(questions(1))
    with serving(lambda *_: time.sleep(0.5)) as server, pytest.raises(ConnectionError, match="timed out"):
        captioner(server.url, max_retries=0, timeout_s=0.1).answer(questions(1))


def test_a_server_that_dies_keeps_what_it_answered(items, tmp_path):
    def dying(handler, body, number):
        if len(handler.server.tries) > 4:
            handler.reply({}, 503)
        else:
            answering(handler, body, number)

    with serving(dying) as server, pytest.raises(ConnectionError, match="is down"):
        describe_all(items, captioner(server.url, max_retries=0), Gate(), work=tmp_path / "work")
    with serving(answering) as server:
        table = describe_all(items, captioner(server.url), Gate(), work=tmp_path / "work")
        assert len(server.requests) == 6
    assert set(table["verdict"].to_pylist()) == {"accepted"}


def test_a_captioner_in_this_process_with_the_same_answers_gives_the_same_table(items, tmp_path):
    class Local:
        name, model = "openai", "tiny"
        config = PromptedConfig(batch_size=3)

        def answer(self, asked):
            return [Answer(recorded(question.seed), True) for question in asked]

    with serving(answering) as server:
        served = describe_all(items, captioner(server.url), Gate(), work=tmp_path / "a")
    local = describe_all(items, Local(), Gate(), work=tmp_path / "b")
    assert served.drop_columns(["question_digest"]).equals(local.drop_columns(["question_digest"]))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="must begin with http"):
        OpenAiConfig(base_url="127.0.0.1:8000", model="m")
    for url in ("http://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ValueError, match="api_key_env") as caught:
            OpenAiConfig(base_url=url, model="m")
        assert "secret" not in caught.value.errors()[0]["msg"]
    with pytest.raises(ValueError, match="should match pattern"):
        OpenAiConfig(base_url="http://host/v1", model="m", api_key_env="sk-1234")
    with pytest.raises(ValueError, match="environment variable MY_KEY"):
        captioner("http://127.0.0.1/v1", api_key_env="MY_KEY")
