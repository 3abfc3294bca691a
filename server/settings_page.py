"""`python -m server.settings_page` prints docs/settings.md: every setting, from its one description."""

from server.settings import reference

HEAD = """# Settings

Everything of PERFT's own, by flag, environment variable or TOML file, the first that has it counts. Unknown keys of the
file and unknown `PERFT_` variables are refused. vLLM's own flags stay vLLM's (`perft serve --help=all`).

"""


def page() -> str:
    return HEAD + reference()


if __name__ == "__main__":
    print(page(), end="")
