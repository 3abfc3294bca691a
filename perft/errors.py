"""Owns how input is refused outside of a server: a sentence, and every problem that was found, a line each."""

from collections.abc import Sequence

SHOWN = 20
"""Problems that are listed; of more, the number."""


class InputError(ValueError):
    """What was handed in (options, data, a checkpoint, a base) cannot be used."""

    def __init__(self, headline: str, problems: Sequence[str] = ()) -> None:
        listed = list(problems[:SHOWN])
        if len(problems) > SHOWN:
            listed.append(f"and {len(problems) - SHOWN} more")
        super().__init__("\n  - ".join([headline, *listed]))
        self.headline, self.problems = headline, list(problems)
