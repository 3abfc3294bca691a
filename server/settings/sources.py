"""Owns the sources of settings: flag, then environment variable, then TOML file; the first that has a setting wins.

Invariant: one message lists every problem, each under the name by which the setting was given, and shows no secret.
`python -m server.settings.sources` prints docs/settings.md.
"""

import os
import re
import sys
import tomllib
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adapters.access import read_problem
from server.errors import StartError
from server.settings.key_files import file_problem
from server.settings.model import ENVIRONMENT_PREFIX, FILE_ARGUMENT, Settings

__all__ = ["Settings", "add_flags", "load", "reference", "reference_page", "repeated_flags"]

CONFIG_FLAG, CONFIG_VARIABLE = "--perft-config", "PERFT_CONFIG"
CONFIG_HELP = "a TOML file with settings, named as in the table; flags and environment variables override it"
# Read elsewhere: the demo's folder for its base, the engine's kill switch, and the server that `perft adapters` calls.
OTHER_VARIABLES = ("PERFT_CACHE", "PERFT_DISABLED", "PERFT_SERVER")
PAGE_HEAD = """# Settings

Every setting of PERFT is a flag, an environment variable and a key of a TOML file; the first that has it wins. Unknown
keys in the file and unknown `PERFT_` variables are errors. vLLM's own flags work too (`perft serve --help=all`), on the
command line only. A file, used with `perft serve MODEL --perft-config perft.toml`:

```toml
api_keys = ["alice=..."]        # a file that holds keys must be its owner's alone: chmod 600 perft.toml
max_adapters = 100
log_format = "json"
```

Three variables are not settings of the server: `PERFT_SERVER` is the URL that `perft adapters` calls, `PERFT_CACHE` is
where the demo keeps its base and its store (default `~/.cache/perft`), and `PERFT_DISABLED=1` leaves vLLM untouched
(`perft serve` then refuses to start).

"""
_DESTINATION = "perft_"
_REPEATED_FLAGS = {"api_keys": ("--api-key", "LABEL=KEY"), "adapter_sources": ("--adapter-source", "PLACE")}
"""Setting -> its flag, which may be given several times, and what that takes."""
# Kubernetes sets these in every pod beside a Service whose name begins with `perft`.
_SERVICE_LINK = re.compile(
    r"PERFT_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return _REPEATED_FLAGS[name][0] if name in _REPEATED_FLAGS else "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def repeated_flags() -> dict[str, str]:
    """The flags that may be given several times: attribute of the parsed arguments -> flag."""
    return {_DESTINATION + name: flag_of(name) for name in _REPEATED_FLAGS}


def add_flags(group: _ArgumentGroup | ArgumentParser) -> None:
    """Add one flag per setting, without a default: a flag that is not given leaves no attribute.

    vLLM's own `--api-key` (no labels, part of the routes only) is replaced by ours; its attribute stays, as None.
    """
    group.add_argument(
        CONFIG_FLAG, dest=f"{_DESTINATION}config", metavar="FILE", default=SUPPRESS, help=CONFIG_HELP.replace("%", "%%")
    )
    for name, field in Settings.model_fields.items():
        _add_flag(group, name, field)
    group.set_defaults(api_key=None)


def load(args: Namespace) -> Settings:
    """Read the settings. Removes our attributes from `args`, so that a key given as a flag is never logged.

    Raises StartError with every problem.
    """
    flags = {name: args.__dict__.pop(_DESTINATION + name) for name in _given(args)}
    chosen = flags.pop("config", None) or os.environ.get(CONFIG_VARIABLE)
    path = None if chosen is None else Path(chosen).expanduser().absolute()
    problems = environment_problems(os.environ)
    if path is not None and (problem := config_problem(path)):
        problems, path = [*problems, problem], None

    try:
        settings = Settings(**flags | {FILE_ARGUMENT: path})
    except ValidationError as error:
        problems += [_explain(item, flags, path) for item in error.errors(include_url=False)]
    if problems:
        raise StartError("\n".join(problems))
    if warning := argv_warning(flags):
        print(f"perft: warning: {warning}", file=sys.stderr, flush=True)
    return settings


def argv_warning(flags: Iterable[str]) -> str | None:
    """What is unsafe about settings given as flags: keys, which other users of the machine see in the process list."""
    keys = [name for name in flags if name in Settings.model_fields and _is_secret(Settings.model_fields[name])]
    if not keys:
        return None
    files = [f"{name.removesuffix('s')}_file" for name in keys]
    instead = [flag_of(name) for name in files if name in Settings.model_fields] or [CONFIG_FLAG]
    return (
        f"{', '.join(map(flag_of, keys))}: others on this machine can read a key on the command line (ps); "
        f"set {', '.join(map(variable_of, keys))} in the environment, or use {', '.join(instead)}"
    )


def environment_problems(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the PERFT_ variables: unknown ones."""
    known = [*map(variable_of, Settings.model_fields), CONFIG_VARIABLE, *OTHER_VARIABLES]
    given = (name for name in sorted(environment) if name.upper().startswith(ENVIRONMENT_PREFIX))
    return [
        _unknown(name, name.upper(), known)
        for name in given
        if name.upper() not in known and not _SERVICE_LINK.fullmatch(name)
    ]


def config_problem(path: Path) -> str | None:
    """Why a settings file cannot be used; None if it can."""
    if problem := read_problem(path, f"chown {os.geteuid()} {path}"):
        return f"{CONFIG_FLAG} {problem}"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{CONFIG_FLAG} {path}: found no readable file ({error.strerror}), expected TOML"
    except UnicodeDecodeError:
        return f"{CONFIG_FLAG} {path}: found no UTF-8 text, expected TOML"
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at .*\)$", str(error))
        return f"{CONFIG_FLAG} {path}: found no valid TOML {where[0] if where else ''}".rstrip()
    secrets = {name for name, field in Settings.model_fields.items() if _is_secret(field)}
    problem = file_problem(path) if secrets & {name.lower() for name in values} else None
    return f"{CONFIG_FLAG} {problem} (it holds keys)" if problem else None


def reference() -> str:
    """The table of every setting, as Markdown."""
    rows = [f"| `{CONFIG_FLAG}` | `{CONFIG_VARIABLE}` | | none | {CONFIG_HELP} |"]
    for name, field in Settings.model_fields.items():
        rows.append(
            f"| `{flag_of(name)}` | `{variable_of(name)}` | `{name}` | {_default_of(field)} | {field.description} |"
        )
    return "\n".join(["| flag | environment | in the file | default | meaning |", "|---|---|---|---|---|", *rows, ""])


def reference_page() -> str:
    """The text of docs/settings.md."""
    return PAGE_HEAD + reference()


def _given(args: Namespace) -> list[str]:
    names = ["config", *Settings.model_fields]
    return [name for name in names if hasattr(args, _DESTINATION + name)]


def _add_flag(group: _ArgumentGroup | ArgumentParser, name: str, field: FieldInfo) -> None:
    assert field.description is not None, name
    text = f"{field.description} (default: {_default_of(field)})".replace("`", "").replace("%", "%%")
    options: dict[str, Any] = {"dest": _DESTINATION + name, "default": SUPPRESS, "help": text}
    if field.annotation is bool:
        group.add_argument(flag_of(name), action=BooleanOptionalAction, **options)
    elif name in _REPEATED_FLAGS:
        handler, group.conflict_handler = group.conflict_handler, "resolve"  # vLLM has an --api-key of its own
        group.add_argument(flag_of(name), action="append", metavar=_REPEATED_FLAGS[name][1], **options)
        group.conflict_handler = handler
    else:
        group.add_argument(flag_of(name), metavar=_metavar(field), **options)


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) or (field.annotation,)


def _metavar(field: FieldInfo) -> str:
    kinds = _kinds(field)
    if all(isinstance(kind, str) for kind in kinds):
        return "{" + ",".join(kinds) + "}"
    names = {SecretStr: "KEY", Path: "PATH", int: "N", float: "SECONDS"}
    return next((names[kind] for kind in kinds if kind in names), "VALUE")


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in _kinds(field)  # api_keys is tuple[SecretStr, ...]


def _default_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if isinstance(extra, dict):
        return str(extra["default"])
    if field.default is None or field.default == ():
        return "none"
    value = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{value}`"


def _explain(error: ErrorDetails, flags: dict[str, Any], path: Path | None) -> str:
    """One of pydantic's errors in our words."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return _unknown(f"{path}: {name}", name, list(Settings.model_fields))
    if name in flags:
        where = flag_of(name)
    else:
        is_set = variable_of(name) in (known.upper() for known in os.environ)
        where = variable_of(name) if is_set else f"{path}: {name}"
    if error["type"] == "value_error":
        return "\n".join(f"{where}: {line}" for line in message.splitlines())
    found = "" if _is_secret(Settings.model_fields[name]) else f"found {error['input']!r}; "
    return f"{where}: {found}{message[:1].lower()}{message[1:]}"


def _unknown(where: str, name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{where}: found an unknown setting{hint}, expected one of {', '.join(sorted(known))}"


if __name__ == "__main__":
    print(reference_page(), end="")
