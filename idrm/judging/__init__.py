"""Win rates: a judge reads two models' responses to the same prompts, in both orders (arXiv 2508.02618, Table 1)."""

from idrm.judging.answer_cache import AnswerCache
from idrm.judging.comparison import JudgedPair, WinRate, judge_pairs, win_rate
from idrm.judging.endpoint import ChatEndpoint
from idrm.judging.endpoint_judge import EndpointJudge
from idrm.judging.judge import Judge, Message, Verdict
from idrm.judging.responses import Response, ResponsePair, match_responses, read_responses
from idrm.judging.template import load_template, read_verdict

__all__ = [
    "AnswerCache",
    "ChatEndpoint",
    "EndpointJudge",
    "Judge",
    "JudgedPair",
    "Message",
    "Response",
    "ResponsePair",
    "Verdict",
    "WinRate",
    "judge_pairs",
    "load_template",
    "match_responses",
    "read_responses",
    "read_verdict",
    "win_rate",
]
