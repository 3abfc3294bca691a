"""Owns running lm-evaluation-harness against a server: its own API models, its own tasks and scores.

`local-completions` where a task compares likelihoods, `local-chat-completions` where it generates from a chat.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perft.errors import InputError
from perft.reading import printable
from server.evaluation.connection import Server


def run_harness(
    server: Server, model: str, tasks: Sequence[str], tokenizer: str, is_chat: bool, at_once: int, limit: int | None,
    include: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Task -> its metrics, as the harness reports them. Raises InputError."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("--harness needs lm-evaluation-harness: pip install 'perft-server[eval]'") from None
    import os

    os.environ["OPENAI_API_KEY"] = server.key or ""  # the harness sends this one, and a key for OpenAI is not for here
    path = "chat/completions" if is_chat else "completions"
    arguments = {
        "model": model, "base_url": f"{server.url}/v1/{path}", "num_concurrent": at_once, "max_retries": 3,
        "tokenizer": tokenizer, "tokenizer_backend": "huggingface", "tokenized_requests": False,
    }  # fmt: skip
    try:
        manager = TaskManager(include_path=None if include is None else str(include))
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if unknown:
            raise InputError(f"lm-evaluation-harness has no task {', '.join(unknown)}: see `lm-eval ls tasks`")
        found = lm_eval.simple_evaluate(
            model="local-chat-completions" if is_chat else "local-completions", model_args=arguments,
            tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=is_chat, bootstrap_iters=1000,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # the harness lets errors of any kind through: of requests, tasks and tokenizers
        reason = printable(str(error)) or "no reason given"
        raise InputError(
            f"lm-evaluation-harness stopped for {model} at {server.url}: {type(error).__name__}: {reason}"
        ) from error
    if found is None:
        raise InputError("lm-evaluation-harness returned no result")
    results: dict[str, Any] = found["results"]
    return results
