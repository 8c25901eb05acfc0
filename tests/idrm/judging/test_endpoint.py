"""When a request is sent again, and what is said of one that is not answered."""

import datetime
import email.utils
import itertools
import socket
import threading
import time

import pytest

from idrm.errors import InputError
from idrm.judging import ChatEndpoint

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Ärger?"}], "temperature": 0}


@pytest.fixture
def client(endpoint):
    """client(...): a ChatEndpoint at the stub that hardly waits."""
    made = []

    def make(**options):
        made.append(ChatEndpoint(endpoint.url, **{"first_wait": 0.001, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def answers(endpoint):
    """answers(...): what the stub answers one request after the other, the last one for ever."""

    def use(*replies):
        following = itertools.chain(replies, itertools.repeat(replies[-1]))
        endpoint.answer = lambda request: next(following)

    return use


def test_an_answer(endpoint, client, answers, reply, chat_completion):
    answers(reply(chat_completion("Grüße", finish_reason="stop")))
    assert client(key="a-secret-key").complete(REQUEST) == ("Grüße", "stub-2026", "stop")
    assert endpoint.requests == [REQUEST]
    assert endpoint.keys == ["Bearer a-secret-key"]


def test_no_key_is_sent_without_one(endpoint, client, answers):
    answers("yes")
    client().complete(REQUEST)
    assert endpoint.keys == [None]


def test_the_url_may_be_that_of_the_completions(endpoint, answers):
    answers("yes")
    for url in (f"{endpoint.url}/", f"{endpoint.url}/chat/completions"):
        with ChatEndpoint(url) as client:
            assert client.url == f"{endpoint.url}/chat/completions"
            assert client.complete(REQUEST).text == "yes"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_busy_endpoint_is_asked_again(endpoint, client, answers, reply, status):
    answers(reply("busy", status), reply({"error": {"message": "busy"}}, status), "yes")
    assert client().complete(REQUEST).text == "yes"
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "",
        "{",
        "[]",
        "null",
        {"choices": []},
        {"choices": [{"message": {"content": ["parts"]}}]},
        {"error": "x"},
    ],
)
def test_a_malformed_body_is_asked_again(endpoint, client, answers, reply, body):
    answers(reply(body), "yes")
    assert client().complete(REQUEST).text == "yes"
    answers(reply(body))
    with pytest.raises(InputError, match=r"/v1/chat/completions: answered no chat completion \(.*\), 2 times in a row"):
        client(max_retries=1).complete(REQUEST)


def test_an_answer_without_words_is_one(client, answers, reply, chat_completion):
    answers(reply(chat_completion(None, finish_reason="length")))
    assert client().complete(REQUEST) == ("", "stub-2026", "length")


def test_retry_after_is_honoured(client, answers, reply):
    answers(reply("slow down", 429, {"Retry-After": "1"}), "yes")
    start = time.monotonic()
    assert client().complete(REQUEST).text == "yes"
    assert time.monotonic() - start >= 1
    # Zero seconds are zero seconds, whatever the own wait would be.
    answers(reply("slow down", 503, {"Retry-After": "0"}), "yes")
    assert client(first_wait=50).complete(REQUEST).text == "yes"


def test_retry_after_may_be_a_date(client, answers, reply):
    now = datetime.datetime.now(datetime.timezone.utc)
    past, far = (email.utils.format_datetime(now + datetime.timedelta(hours=hours), usegmt=True) for hours in (-1, 2))
    answers(reply("slow down", 429, {"Retry-After": past}), "yes")
    assert client(first_wait=50).complete(REQUEST).text == "yes"
    answers(reply("slow down", 429, {"Retry-After": far}))
    with pytest.raises(InputError, match=r"answered 429 \(slow down\), and asks to wait for 7,[12]\d\d s"):
        client().complete(REQUEST)
    answers(reply("slow down", 429, {"Retry-After": "soon"}), "yes")
    assert client().complete(REQUEST).text == "yes"


def test_own_waits_grow(client, answers, reply, monkeypatch):
    waits = []
    slow = client(first_wait=4, max_retries=6)
    monkeypatch.setattr(slow._closed, "wait", lambda seconds: waits.append(seconds))
    answers(reply("busy", 500))
    with pytest.raises(InputError, match=r"answered 500 \(busy\), 7 times in a row"):
        slow.complete(REQUEST)
    longest = [4, 8, 16, 32, 60, 60]
    assert len(waits) == len(longest)
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_one_line_at_once(endpoint, client, answers, reply, status):
    answers(reply({"error": {"message": "no such\n\tmodel \x1b[31m", "type": "x"}}, status))
    with pytest.raises(InputError) as error:
        client().complete(REQUEST)
    assert str(error.value) == f"--endpoint {endpoint.url}/chat/completions: answered {status} (no such model [31m)"
    assert len(endpoint.requests) == 1


def test_the_key_is_in_no_error_and_no_answer(client, answers, reply):
    key = "sk-very-secret"
    for status in (400, 500):
        answers(reply({"error": {"message": f"Incorrect API key: {key}"}}, status))
        with pytest.raises(InputError) as error:
            client(key=key, max_retries=0).complete(REQUEST)
        assert key not in str(error.value)
        assert "Incorrect API key: [the API key]" in str(error.value)
    answers(f"You sent {key}.\nVerdict: 1")
    assert client(key=key).complete(REQUEST).text == "You sent [the API key].\nVerdict: 1"


def test_a_timeout_is_asked_again(endpoint, client):
    released = threading.Event()

    def answer(request):
        if len(endpoint.requests) == 1:
            released.wait(20)
        return "yes"

    endpoint.answer = answer
    assert client(timeout=0.3).complete(REQUEST).text == "yes"
    released.set()
    assert len(endpoint.requests) == 2


def test_an_endpoint_that_is_not_there():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with (
        ChatEndpoint(url, max_retries=2, first_wait=0.001) as client,
        pytest.raises(InputError, match=r"cannot be reached \(.*refused.*\), 3 times in a row"),
    ):
        client.complete(REQUEST)


def test_closing_ends_a_wait(client, answers, reply):
    answers(reply("busy", 503))
    waiting = client(first_wait=60)
    threading.Timer(0.2, waiting.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        waiting.complete(REQUEST)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8000", "expected a URL such as"),
        ("api.openai.com/v1", "expected a URL such as"),
        ("http://", "expected a URL such as"),
        ("http://me:hunter2", "--endpoint: is no URL"),
        ("https://me:hunter2@host/v1", "without user name"),
        ("https://host/v1?key=hunter2", "without user name"),
    ],
)
def test_urls_that_are_none(url, expected):
    with pytest.raises(InputError) as error:
        ChatEndpoint(url)
    assert expected in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_keys_that_no_header_can_hold(key):
    with pytest.raises(InputError, match="the API key: expected printable ASCII") as error:
        ChatEndpoint("http://localhost/v1", key=key)
    assert key not in str(error.value)
