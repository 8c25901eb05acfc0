"""An OpenAI-compatible chat completions endpoint: requests, and when to ask again."""

from __future__ import annotations

import datetime
import email.utils
import logging
import random
import threading
from typing import Any, NamedTuple

import httpx2

from idrm.errors import InputError

logger = logging.getLogger(__name__)

PATH = "/chat/completions"
LONGEST_WAIT = 60.0
# An endpoint that asks for more patience than this gets none: the command says so, and can be repeated later.
LONGEST_RETRY_AFTER = 600.0
# A shorter key is no secret but a word ("EMPTY", "none") that servers without keys are given.
_SHORTEST_SECRET = 8
_SHOWN_CHARACTERS = 300
_TRY_AGAIN = (408, 429)


class Answer(NamedTuple):
    """A chat completion: its text, the name of the model as the endpoint gives it, and why the text ends."""

    text: str
    model: str | None
    finish_reason: str | None


class _Unanswered(Exception):
    """A request that may be answered when it is sent again, after the seconds that the endpoint asked for."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class ChatEndpoint:
    """Sends requests to one endpoint, from any number of threads; a context manager, which closes connections.

    Timeouts, failed connections, statuses 408, 429 and 5xx and bodies that hold no chat completion are tried again,
    after as long as Retry-After says, else after first_wait * 2^n seconds (at most 60), shortened at random by up to
    half so that threads do not return together.

    Args:
        url: base URL of the API (https://api.openai.com/v1), with or without /chat/completions.
        key: sent as a bearer token; None for an endpoint without keys. It is in no error and no answer.
        timeout: seconds to wait for an answer.
        max_retries: how often a request is sent again before the endpoint is given up.
        first_wait: seconds before the first of these.

    Raises:
        InputError: a URL that is none or holds credentials, or a key that no header can hold.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 6,
        first_wait: float = 1.0,
    ):
        self.url = _completions_url(url)
        if key is not None and (not key.isascii() or not key.isprintable() or " " in key):
            raise InputError("the API key: expected printable ASCII characters without white space")
        self._key = key
        self._max_retries = max_retries
        self._first_wait = first_wait
        self._closed = threading.Event()
        self._client = httpx2.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            # As many connections as there are threads.
            limits=httpx2.Limits(max_connections=None),
        )

    def __enter__(self) -> ChatEndpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; a thread that waits to send a request again gives up."""
        self._closed.set()
        self._client.close()

    def complete(self, request: dict[str, Any]) -> Answer:
        """The answer to a request body (`model`, `messages`, ...).

        Raises:
            InputError: the endpoint refuses the request, or does not answer it however often it is sent.
        """
        for attempt in range(self._max_retries + 1):
            try:
                return self._send(request)
            except _Unanswered as error:
                reason = str(error)
                if attempt == self._max_retries:
                    break
                wait = min(self._first_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
                if error.retry_after is not None:
                    wait = error.retry_after
                if wait > LONGEST_RETRY_AFTER:
                    raise InputError(
                        f"--endpoint {self.url}: {reason}, and asks to wait for {wait:,.0f} s; repeat the command then"
                    ) from None
            logger.warning("%s: %s; asked again in %.1f s.", self.url, reason, wait)
            if self._closed.wait(wait):
                raise RuntimeError("the endpoint was closed while a request waited to be sent again")
        raise InputError(f"--endpoint {self.url}: {reason}, {attempt + 1} times in a row")

    def _send(self, request: dict[str, Any]) -> Answer:
        try:
            response = self._client.post(self.url, json=request)
        except httpx2.TimeoutException as error:
            raise _Unanswered(f"timed out ({type(error).__name__})") from None
        except httpx2.RequestError as error:
            raise _Unanswered(f"cannot be reached ({self._shown(str(error)) or type(error).__name__})") from None
        if response.status_code != 200:
            reason = f"answered {response.status_code}"
            message = self._shown(_error_message(response))
            reason = f"{reason} ({message})" if message else reason
            if response.status_code in _TRY_AGAIN or response.status_code >= 500:
                raise _Unanswered(reason, _retry_after(response.headers.get("Retry-After")))
            raise InputError(f"--endpoint {self.url}: {reason}")
        try:
            body = response.json()
            choice = body["choices"][0]
            text = choice["message"]["content"]
            model, finish_reason = (
                value if isinstance(value, str) else None for value in (body.get("model"), choice.get("finish_reason"))
            )
            # A refusal, or a budget of tokens spent on reasoning: an answer without words.
            text = "" if text is None else text
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise _Unanswered(f"answered no chat completion ({self._shown(response.text)})")
        return Answer(self._without_key(text), model, finish_reason)

    def _shown(self, text: str) -> str:
        """What an endpoint said, as part of one line."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self._without_key(text)).split())
        return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + "..."

    def _without_key(self, text: str) -> str:
        if self._key is None or len(self._key) < _SHORTEST_SECRET:
            return text
        return text.replace(self._key, "[the API key]")


def _completions_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        # Without what was given: it may hold a password.
        raise InputError("--endpoint: is no URL; expected one such as https://api.openai.com/v1") from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError("--endpoint: expected a URL without user name, password, query and fragment")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"--endpoint {url}: expected a URL such as https://api.openai.com/v1")
    return url.rstrip("/").removesuffix(PATH) + PATH


def _error_message(response: httpx2.Response) -> str:
    """The message of an error body, else the whole body."""
    try:
        body = response.json()
    except ValueError:
        return response.text
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else response.text


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, section 10.2.3)."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return max((moment - datetime.datetime.now(datetime.timezone.utc)).total_seconds(), 0.0)
