"""`python -m server.settings.page` prints docs/settings.md: every setting, from its one description."""

from server.settings.sources import reference

HEAD = """# Settings

Everything of PERFT's own, by flag, environment variable or TOML file, the first that has it counts. Unknown keys of the
file and unknown `PERFT_` variables are refused. vLLM's own flags stay vLLM's (`perft serve --help=all`).

Three variables are no settings of the server: `PERFT_SERVER` is the URL that `perft adapters` asks, `PERFT_CACHE`
where the demo keeps its base, and `PERFT_DISABLED=1` leaves vLLM untouched (`perft serve` then refuses to start).

"""


def page() -> str:
    return HEAD + reference()


if __name__ == "__main__":
    print(page(), end="")
