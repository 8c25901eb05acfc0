"""A judge behind a chat completions endpoint."""

from __future__ import annotations

from typing import Any

from idrm.judging.answer_cache import AnswerCache
from idrm.judging.endpoint import Answer, ChatEndpoint
from idrm.judging.judge import Message, Verdict
from idrm.judging.template import REMINDER, fill_template, load_template, read_verdict


class EndpointJudge:
    """Asks a model at temperature 0, each request once: answers are kept in a cache.

    An answer that `read_verdict` cannot read is followed by a reminder, in the same conversation: the same request
    would get the same answer.

    Args:
        endpoint: where the model is.
        model: its name there.
        cache: of answers.
        template: text with {prompt}, {first} and {second}; None for the package's own.
        max_tokens: longest answer, as the request's `max_tokens`; None leaves it to the endpoint.
        max_reminders: how often a judge is reminded before its verdict counts as unparseable.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        model: str,
        cache: AnswerCache,
        *,
        template: str | None = None,
        max_tokens: int | None = None,
        max_reminders: int = 2,
    ):
        self._endpoint = endpoint
        self._cache = cache
        self._template = load_template() if template is None else template
        self._max_reminders = max_reminders
        self._settings: dict[str, Any] = {"model": model, "temperature": 0}
        if max_tokens is not None:
            self._settings["max_tokens"] = max_tokens

    def verdict(self, prompt: tuple[Message, ...], first: str, second: str) -> Verdict:
        """See `Judge`; raises InputError where the endpoint does not answer or the cache cannot be written to."""
        messages = [{"role": "user", "content": fill_template(self._template, prompt, first, second)}]
        answers: list[str] = []
        requests = 0
        for _ in range(self._max_reminders + 1):
            answer, asked = self._answer(messages)
            answers.append(answer.text)
            requests += asked
            preference = read_verdict(answer.text)
            if preference is not None:
                break
            # Endpoints refuse an empty message.
            said = answer.text if answer.text.strip() else "(no answer)"
            messages = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": REMINDER}]
        return Verdict(preference, tuple(answers), requests, answer.model)

    def _answer(self, messages: list[dict[str, str]]) -> tuple[Answer, bool]:
        """The answer, and whether it had to be asked for."""
        request = {**self._settings, "messages": messages}
        answer = self._cache.find(self._endpoint.url, request)
        if answer is not None:
            return answer, False
        answer = self._endpoint.complete(request)
        self._cache.store(self._endpoint.url, request, answer)
        return answer, True
