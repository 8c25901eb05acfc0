"""The command `idrm judge`: two response files to a win rate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b

from rich.console import Console

from idrm.judging.answer_cache import AnswerCache
from idrm.judging.arguments import JudgeConfiguration, parse_arguments
from idrm.judging.comparison import judge_pairs, win_rate
from idrm.judging.endpoint import ChatEndpoint
from idrm.judging.endpoint_judge import EndpointJudge
from idrm.judging.report import Comparison, print_table, write_files
from idrm.judging.responses import match_responses, read_responses
from idrm.judging.template import DEFAULT_TEMPLATE, load_template
from idrm.processes import command
from idrm.run_folder import require_writable

logger = logging.getLogger("idrm.judging")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; bad input and an interruption are one line on stderr, status 2 and 130."""
    with command():
        compare(parse_arguments(argv))


def compare(config: JudgeConfiguration) -> None:
    """Judges all pairs and writes the report.

    Raises:
        InputError: anything the user can put right. No report has been written then, and answers that had come are
            kept: the same command goes on from there.
    """
    arguments = config.arguments
    a, b = (read_responses(path) for path in config.responses)
    pairs = match_responses(a, b)
    template = load_template(arguments.judge_template or DEFAULT_TEMPLATE)
    require_writable("--output_dir", config.output_dir)
    require_writable("--cache_dir", config.cache_dir)
    with ChatEndpoint(
        arguments.endpoint, key=config.key, timeout=arguments.timeout, max_retries=arguments.max_retries
    ) as endpoint:
        judge = EndpointJudge(
            endpoint,
            arguments.judge_model,
            AnswerCache(config.cache_dir),
            template=template,
            max_tokens=arguments.max_tokens,
            max_reminders=arguments.max_reminders,
        )
        logger.info("%s pairs, read in both orders by %s at %s", f"{len(pairs):,}", arguments.judge_model, endpoint.url)
        judged = judge_pairs(judge, pairs, concurrency=arguments.concurrency)
    requests = sum({id(verdict): verdict.requests for pair in judged for verdict in pair.verdicts}.values())
    logger.info("%s answers were asked for; all are kept in %s", f"{requests:,}", config.cache_dir)
    comparison = Comparison(
        a=config.responses[0],
        b=config.responses[1],
        judge=arguments.judge_model,
        endpoint=endpoint.url,
        template=arguments.judge_template,
        template_digest=blake2b(template.encode(), digest_size=8).hexdigest(),
        result=win_rate(judged),
        judged=judged,
    )
    print_table(comparison, Console())
    write_files(config.output_dir, comparison)
    logger.info("The report is in %s", config.output_dir)
