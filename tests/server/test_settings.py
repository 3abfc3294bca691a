"""Settings: which source counts, what is refused and in which words, and that no secret is ever repeated."""

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import StartError
from server.settings.sources import (
    Settings,
    add_flags,
    environment_problems,
    flag_of,
    load,
    reference,
    repeated_flags,
    variable_of,
)

SECRET = "s3cret-that-nobody-may-see"
File = Callable[[str], Path]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*map(variable_of, Settings.model_fields), "PERFT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def file(tmp_path: Path) -> File:
    def write(text: str, mode: int = 0o600) -> Path:
        path = tmp_path / "perft.toml"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def parse(*flags: str) -> Namespace:
    parser = ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return parser.parse_args(flags)


def refusal(*flags: str) -> str:
    with pytest.raises(StartError) as refused:
        load(parse(*flags))
    return str(refused.value)


def label_of(settings: Settings, key: str) -> str | None:
    caller = settings.key_ring.identify(f"Bearer {key}")
    return None if caller is None else caller.label


def test_flag_goes_before_environment_before_file_before_default(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file("pool_rows = 1\nmax_adapters = 2\nmax_versions = 3\n")
    monkeypatch.setenv("PERFT_POOL_ROWS", "10")
    monkeypatch.setenv("PERFT_MAX_ADAPTERS", "20")
    settings = load(parse("--perft-config", str(path), "--pool-rows", "100"))
    assert (settings.pool_rows, settings.max_adapters, settings.max_versions) == (100, 20, 3)
    assert settings.metrics_max_adapters == 500


def test_the_file_is_named_by_the_environment_too_and_the_flag_goes_before(
    file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERFT_CONFIG", str(file("pool_rows = 5")))
    assert load(parse()).pool_rows == 5
    other = tmp_path / "other.toml"
    other.write_text("pool_rows = 6")
    assert load(parse("--perft-config", str(other))).pool_rows == 6


def test_a_switch_can_be_turned_off_again_by_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_ALLOW_OTHER_BASE", "true")
    assert load(parse()).allow_other_base is True
    assert load(parse("--no-allow-other-base")).allow_other_base is False


def test_where_things_lie_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(parse())
    assert settings.adapter_store == tmp_path / "data" / "perft" / "store"
    assert settings.audit_path == tmp_path / "data" / "perft" / "store.audit.jsonl"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(parse()).adapter_store == tmp_path / ".local" / "share" / "perft" / "store"
    assert load(parse("--adapter-store", "~/x")).audit_path == tmp_path / "x.audit.jsonl"
    assert load(parse("--audit-log", "/var/log/perft")).audit_path == Path("/var/log/perft")


@pytest.mark.parametrize(
    "given",
    ["a=first-key,b=second=key", '["a=first-key", "b=second=key"]', '{"a": "first-key", "b": "second=key"}'],
    ids=["commas", "list", "object"],
)
def test_keys_of_the_environment(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_API_KEYS", given)
    settings = load(parse())
    assert [label_of(settings, key) for key in ("first-key", "second=key")] == ["a", "b"]


def test_keys_of_a_flag_of_a_file_and_of_the_settings_file(file: File, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# a comment\n\n  c=third-key-of-all  \n")
    keys.chmod(0o640)
    admin = tmp_path / "admin"
    admin.write_text("the-admin-key\n")
    admin.chmod(0o600)
    settings = load(parse("--api-key", "a=first-key", "--api-key=b=second-key", f"--api-key-file={keys}"))
    given = ["first-key", "second-key", "third-key-of-all"]
    assert [label_of(settings, key) for key in given] == ["a", "b", "c"] and not settings.key_ring.has_admin
    settings = load(parse("--perft-config", str(file(f'admin_key_file = "{admin}"\n[api_keys]\nd = "fourth-key"'))))
    assert label_of(settings, "fourth-key") == "d" and settings.key_ring.has_admin
    caller = settings.key_ring.identify("Bearer the-admin-key")
    assert caller is not None and caller.is_admin


def test_the_flags_are_taken_out_of_the_arguments() -> None:
    """vLLM logs the arguments that are not its defaults."""
    args = parse("--api-key", f"a={SECRET}", "--admin-key", SECRET + "2", "--pool-rows", "3")
    settings = load(args)
    assert args == Namespace(api_key=None)
    assert SECRET not in repr(settings) and SECRET not in str(settings.model_dump())


def test_a_flag_that_is_not_given_leaves_nothing_behind() -> None:
    assert parse() == Namespace(api_key=None)
    parser = ArgumentParser()
    add_flags(parser)
    ours = [action for action in parser._actions if action.dest.startswith("perft_")]
    assert len(ours) == len(Settings.model_fields) + 1
    assert all(action.default is SUPPRESS for action in ours)


def test_flags_stand_beside_vllms_own_and_replace_its_api_key() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    add_flags(parser.add_argument_group("PERFT"))
    args = parser.parse_args(["m", "--api-key", "a=first-key", "--pool_rows=3", "--shutdown-timeout", "4"])
    settings = load(args)
    assert args.api_key is None and args.shutdown_timeout == 4 and args.model_tag == "m"
    assert label_of(settings, "first-key") == "a" and settings.pool_rows == 3
    with pytest.raises(Exception, match="conflicting option string"):
        add_flags(parser.add_argument_group("again"))


def test_the_repeated_flags_are_named() -> None:
    assert repeated_flags() == {"perft_api_keys": "--api-key", "perft_adapter_sources": "--adapter-source"}


def test_sources_of_adapters_come_from_flags_the_environment_or_the_file(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--adapter-source", "/data/a", "--adapter-source", "hf://acme/"]
    assert list(map(str, load(parse(*flags)).allowed_sources)) == ["/data/a", "hf://acme"]
    path = file('adapter_sources = ["s3://bucket/adapters/"]\n')
    assert list(map(str, load(parse("--perft-config", str(path))).allowed_sources)) == ["s3://bucket/adapters"]
    for given in ("/data/a, file:///data/b", '["/data/a", "file:///data/b"]'):
        monkeypatch.setenv("PERFT_ADAPTER_SOURCES", given)
        assert list(map(str, load(parse()).allowed_sources)) == ["/data/a", "/data/b"]
    monkeypatch.setenv("PERFT_ADAPTER_SOURCES", "")
    assert load(parse()).allowed_sources == ()


@pytest.mark.parametrize(
    "source",
    ["/", "data", "./data", "/data/../etc", "/data//x", "hf://", "hf://acme/poet@main", "s3://", "http://x/", "~/x"],
)
def test_a_source_that_allows_too_much_or_is_not_plain_is_refused(source: str) -> None:
    assert "--adapter-source: found" in refusal("--adapter-source", source)


def test_help_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert all(flag_of(name) in shown for name in Settings.model_fields)


def test_everything_wrong_is_in_one_message(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file("max_adapters = 0\nmax_adapter = 3\n")
    monkeypatch.setenv("PERFT_LOG_FORMAT", "xml")
    monkeypatch.setenv("PERFT_ADMINKEY", SECRET)
    lines = refusal("--perft-config", str(path), "--pool-rows", "many", "--metrics-bind", "here").splitlines()
    for expected in (
        "PERFT_ADMINKEY: found an unknown setting (did you mean PERFT_ADMIN_KEY?), expected one of PERFT_",
        f"{path}: max_adapter: found an unknown setting (did you mean max_adapters?), expected one of adapter_cache",
        f"{path}: max_adapters: found 0; input should be greater than or equal to 1",
        "PERFT_LOG_FORMAT: found 'xml'; input should be 'text' or 'json'",
        "--pool-rows: found 'many'; input should be a valid integer",
        "--metrics-bind: found 'here', expected HOST:PORT",
    ):
        assert sum(line.startswith(expected) for line in lines) == 1, (expected, lines)
    assert len(lines) == 6 and SECRET not in "".join(lines)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--api-key", SECRET], "--api-key: entry 1: found no '=', expected LABEL=KEY"),
        (["--api-key", "a=good-key-1", "--api-key", f"a b={SECRET}"], "entry 2: found a label that is not"),
        (["--api-key", f"{SECRET}="], "entry 1: found a key of 0 characters, expected at least 8"),
        (["--api-key", f"{SECRET}=="], "entry 1: found a key of 1 characters"),
        (["--api-key", f"admin={SECRET}"], "the label 'admin', which is the admin key's"),
        (["--api-key", f"a={SECRET} x"], "found a key with a space"),
        (["--api-key", f"a={SECRET}é"], "outside ASCII"),
        (["--admin-key", "short"], "--admin-key: found a key of 5 characters"),
        (["--admin-key", ""], "--admin-key: found a key of 0 characters"),
        (["--metrics-key", "short"], "--metrics-key: found a key of 5 characters"),
        (["--api-key", f"a={SECRET}", "--api-key", f"b={SECRET}"], "found the same key for a, b, expected a key each"),
        (["--api-key", f"a={SECRET}", "--api-key", f"a={SECRET}2"], "found the label 'a' twice"),
        (["--api-key", f"a={SECRET}", "--admin-key", SECRET], "found the same key for a, admin"),
        (["--admin-key", SECRET, "--metrics-key", SECRET], "found the same key for admin, metrics"),
        (["--admin-key", SECRET, "--admin-key-file", "/x"], "admin_key and admin_key_file: found both"),
    ],
)
def test_keys_that_are_refused_and_never_repeated(flags: list[str], expected: str) -> None:
    message = refusal(*flags)
    assert expected in message
    assert SECRET not in message and "short" not in message


def test_an_empty_key_of_the_environment_is_no_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_ADMIN_KEY", "")
    assert "PERFT_ADMIN_KEY: found a key of 0 characters" in refusal()


@pytest.mark.parametrize("given", ["[", '{"a": 3', "[3]", "a=good-key-1,,b=good-key-2"])
def test_broken_keys_of_the_environment(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_API_KEYS", given)
    assert refusal().startswith("PERFT_API_KEYS: ")


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (
            0o644,
            "a=good-key-1",
            "expected one that other users cannot read and only its owner can write; run chmod 600",
        ),
        (0o602, "a=good-key-1", "found a file of mode 602"),
        (0o660, "a=good-key-1", "found a file of mode 660"),
        (0o600, "\n# nothing\n", "found no key, expected one LABEL=KEY per line"),
        (0o600, f"a=good-key-1\n{SECRET}\n\na=x\n", "line 2: found no '='"),
    ],
)
def test_key_files_that_are_refused(tmp_path: Path, mode: int, text: str, expected: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    message = refusal("--api-key-file", str(path))
    assert expected in message and str(path) in message and SECRET not in message


def test_a_key_file_that_is_no_file(tmp_path: Path) -> None:
    assert "found no readable file" in refusal("--api-key-file", str(tmp_path / "missing"))
    assert "found no regular file" in refusal("--admin-key-file", str(tmp_path))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "bytes").chmod(0o600)
    assert "cannot be read as UTF-8" in refusal("--admin-key-file", str(tmp_path / "bytes"))


def test_an_admin_key_file_with_more_than_the_key(tmp_path: Path) -> None:
    path = tmp_path / "admin"
    path.write_text(f"{SECRET}\nsecond line\n")
    path.chmod(0o600)
    assert "found a key with a space" in refusal("--admin-key-file", str(path))


def test_settings_files_that_are_refused(file: File, tmp_path: Path) -> None:
    assert "found no readable file" in refusal("--perft-config", str(tmp_path / "missing.toml"))
    broken = refusal("--perft-config", str(file(f'admin_key = "{SECRET}\n')))
    assert "found no valid TOML (at line 1" in broken and SECRET not in broken
    open_to_all = refusal("--perft-config", str(file(f'ADMIN_KEY = "{SECRET}"', 0o644)))
    assert "run chmod 600 (it holds keys)" in open_to_all and SECRET not in open_to_all
    assert load(parse("--perft-config", str(file("pool_rows = 3", 0o644)))).pool_rows == 3
    wrong = refusal("--perft-config", str(file(f'admin_key = ["{SECRET}"]')))
    assert "admin_key" in wrong and SECRET not in wrong


def test_a_broken_settings_file_does_not_hide_what_else_is_wrong(file: File) -> None:
    message = refusal("--perft-config", str(file("[[[")), "--pool-rows", "0")
    assert "--perft-config" in message and "--pool-rows: found '0'" in message


@pytest.mark.parametrize(
    "name", ["PERFT_DISABLED", "PERFT_CACHE", "PERFT_SERVER", "PERFT_CONFIG", "PERFT_STORE_X_PORT", "OTHER_X"]
)
def test_variables_that_are_known_or_not_ours(name: str) -> None:
    assert environment_problems({name: "1"}) == []


def test_variables_of_a_kubernetes_service_are_not_ours() -> None:
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"]
    assert environment_problems({f"PERFT_{name}": "1" for name in names}) == []
    assert environment_problems({f"PERFT_SERVER_{name}": "1" for name in names}) == []


@pytest.mark.parametrize("name", ["PERFT_", "PERFT_X", "PERFT_API_KEY", "perft_admin", "PERFT_POOL_ROWS_"])
def test_variables_that_mean_nothing_are_refused(name: str) -> None:
    (problem,) = environment_problems({name: SECRET})
    assert problem.startswith(f"{name}: found an unknown setting") and SECRET not in problem


@pytest.mark.parametrize("place", ["store", "store/a/b"])
def test_an_audit_log_inside_the_store_is_refused(place: str, tmp_path: Path) -> None:
    flags = ["--adapter-store", str(tmp_path / "store"), "--audit-log", str(tmp_path / place)]
    assert "which lies inside the store" in refusal(*flags)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("127.0.0.1:9090", ("127.0.0.1", 9090)),
        ("[::1]:1", ("::1", 1)),
        ("metrics.local:65535", ("metrics.local", 65535)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
    ],
)
def test_addresses_of_the_metrics(given: str, expected: tuple[str, int]) -> None:
    assert load(parse("--metrics-bind", given)).metrics_address == expected


@pytest.mark.parametrize(
    "given",
    ["", "9090", ":9090", "h:", "h:65536", "::1:9090", "[::1]", "h:9 ", "a b:1", "h:port", "h:-1", "h:²"],
)
def test_addresses_that_are_none(given: str) -> None:
    assert f"found {given!r}, expected HOST:PORT" in refusal("--metrics-bind", given)


def test_a_metrics_key_that_would_guard_nothing_is_refused() -> None:
    message = refusal("--metrics-key", SECRET, "--metrics-bind", "127.0.0.1:9090")
    assert message.startswith("metrics_key and metrics_bind: found both") and "asks for no key" in message
    assert SECRET not in message
    assert load(parse("--admin-key", SECRET, "--metrics-bind", "127.0.0.1:9090")).key_ring.has_admin


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(SystemExit):
        parse("--admin", SECRET)


def test_the_reference_has_every_setting_once() -> None:
    rows = reference().splitlines()[2:]
    assert len(rows) == len(Settings.model_fields) + 1
    for name, row in zip(Settings.model_fields, rows[1:], strict=True):
        assert row.startswith(f"| `{flag_of(name)}` | `{variable_of(name)}` | `{name}` | ")
        assert row.count("|") == 6, row
    assert str(Path.home()) not in reference()


def test_a_key_on_the_command_line_is_taken_with_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(parse(f"--admin-key={SECRET}-1", f"--api-key=a={SECRET}-2", f"--metrics-key={SECRET}-3", "--max-uploads=3"))
    (line,) = capsys.readouterr().err.splitlines()
    for expected in (
        *("--api-key, --admin-key, --metrics-key: others on this machine can read", "--api-key-file"),
        *("--admin-key-file", "PERFT_ADMIN_KEY", "PERFT_API_KEYS", "PERFT_METRICS_KEY"),
    ):
        assert expected in line
    assert SECRET not in line
    load(parse(f"--metrics-key={SECRET}"))
    assert "--perft-config" in capsys.readouterr().err
    monkeypatch.setenv("PERFT_ADMIN_KEY", SECRET)
    load(parse("--max-uploads=3"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["10.0.0.1, fd00::/8,unix", "10.0.0.1,fd00::/8,unix,"])
def test_proxies_are_separated_by_commas(given: str, monkeypatch: pytest.MonkeyPatch, file: File) -> None:
    expected = ("10.0.0.1", "fd00::/8", "unix")
    assert load(parse(f"--trusted-proxies={given}")).trusted_proxies == expected
    monkeypatch.setenv("PERFT_TRUSTED_PROXIES", given)
    assert load(parse()).trusted_proxies == expected
    monkeypatch.delenv("PERFT_TRUSTED_PROXIES")
    path = file('trusted_proxies = ["10.0.0.1", "fd00::/8", "unix"]')
    assert load(parse(f"--perft-config={path}")).trusted_proxies == expected
    assert "--trusted-proxies: found 'proxy.example'" in refusal("--trusted-proxies=10.0.0.1,proxy.example")
