"""Owns the command `perft chat`: its arguments, the session without a prompt, and how it exits.

Invariant: exit 0 means every model answered, 1 that one did not (its error is beside the others' answers), 2 wrong
usage, 130 interrupted.
"""

import argparse
import asyncio
import math
import sys
from contextlib import suppress

import httpx

from perft.reading import printable
from server.client.arguments import add_connection, server_of
from server.client.chat.asking import Wanted, base_model
from server.client.chat.conversation import Conversation
from server.client.connection import API_KEY, ClientError, Server

MOST_MODELS = 4
MAX_TOKENS = 512
EXIT, RESET = "/exit", "/reset"
INTERRUPTED = 130


def run(arguments: list[str]) -> int:
    """Run `perft chat ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    parser = _parser()
    given = parser.parse_args(arguments)
    server = server_of(parser, given, API_KEY)
    models: list[str] = given.model or []
    if len(models) > MOST_MODELS:
        parser.error(f"--model: found {len(models)} models, expected at most {MOST_MODELS} (and --base)")
    if twice := [model for model in models if models.count(model) > 1]:
        parser.error(f"--model: found {twice[0]!r} more than once, expected each model once")
    prompt: str | None = given.prompt
    if prompt is None and not sys.stdin.isatty():
        try:
            prompt = sys.stdin.buffer.read().decode().strip()
        except UnicodeDecodeError:
            parser.error("found text that is not UTF-8 on standard input, expected the prompt")
    if prompt is not None and not prompt.strip():
        parser.error("found an empty prompt, expected a text")
    try:
        if given.base or not models:
            models = [asyncio.run(_base(server)), *models]
        conversation = Conversation(server, models, Wanted(given.max_tokens, given.temperature), given.system)
        return _session(conversation) if prompt is None else _one(conversation, prompt)
    except ClientError as error:
        print(f"perft chat: {printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"perft chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _one(conversation: Conversation, prompt: str) -> int:
    answers = conversation.turn(prompt)
    return 1 if any(answer.error is not None for answer in answers) else 0


def _session(conversation: Conversation) -> int:
    """Prompts from the terminal, until /exit or the end of input. Ctrl-C ends an answer, not the session."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines and remembers them with it)
    names = ", ".join(map(printable, conversation.models))
    print(
        f"{names}: {RESET} forgets the conversation, {EXIT} or Ctrl-D ends it, Ctrl-C ends an answer", file=sys.stderr
    )
    while True:
        try:
            prompt = _text(input("> ").strip())
        except EOFError:
            print()
            return 0
        except (argparse.ArgumentTypeError, UnicodeDecodeError):
            print("perft chat: found text that is not UTF-8", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(f"\n({EXIT} or Ctrl-D ends the session)", file=sys.stderr)
            continue
        if prompt == EXIT:
            return 0
        if prompt == RESET:
            conversation.reset()
        elif prompt:
            with suppress(KeyboardInterrupt):
                conversation.turn(prompt)


async def _base(server: Server) -> str:
    async with server.open(httpx.AsyncClient) as http:
        return await base_model(http, server)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perft chat",
        description="Send one prompt to the base, or to up to four adapters or versions at once. Their answers stand "
        "side by side as they come (one after the other where the output is no terminal), each with the model that "
        "answered, the time to its first token, tokens per second, and where it parts from the first answer. Without "
        "PROMPT: a session, in which every model has its own history; or the prompt from standard input.",
        epilog="Exit status: 0 every model answered, 1 one did not or the server is unreachable, 2 wrong usage, 130 "
        "interrupted.",
    )
    parser.add_argument("prompt", nargs="?", type=_text, metavar="PROMPT")
    parser.add_argument(
        "--model", action="append", type=_model, metavar="NAME",
        help="NAME or NAME@VERSION; repeatable; the first one is what the others are compared with (default: the base)",
    )  # fmt: skip
    parser.add_argument("--base", action="store_true", help="ask the base too, as the first one")
    parser.add_argument("--system", type=_text, metavar="TEXT", help="the system's message")
    parser.add_argument("--temperature", type=_temperature, metavar="T", help="0 is greedy (default: the server's)")
    parser.add_argument(
        "--max-tokens", type=_tokens, default=MAX_TOKENS, metavar="N", help=f"of each answer (default {MAX_TOKENS})"
    )
    add_connection(parser, is_default=True, variable=API_KEY)
    return parser


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("found text that is not UTF-8") from None
    return text


def _model(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a model's name")
    return text


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        temperature = math.nan
    if not 0 <= temperature < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0")
    return temperature


def _tokens(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 1")
    return int(text)
