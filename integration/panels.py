"""Draws Grafana's dashboard without Grafana: every panel's query, asked of a Prometheus, in the dashboard's layout.

    python -m integration.panels IMAGE                          a server of its own, under traffic for some minutes
    python -m integration.panels IMAGE --prometheus URL --minutes 60

It says which panels found nothing. It draws what queries answer, with the panels' units, thresholds, stacking, legends
and value mappings; it is not Grafana, and shows nothing of how Grafana itself looks or behaves.
"""

import argparse
import tempfile
import time
from pathlib import Path

from integration.panel_answers import Span, ask_all, report
from integration.panel_drawing import draw
from integration.prometheus import SCRAPE_S, Prometheus


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.panels", description=__doc__.partition("\n")[0])
    parser.add_argument("image", type=Path, help="where the picture goes, a PNG file")
    parser.add_argument("--prometheus", metavar="URL", help="ask this one; else one that scrapes servers of its own")
    parser.add_argument("--minutes", type=float, default=5, help="how much is shown, up to now (5)")
    parser.add_argument("--scrape-s", type=float, default=15, help="seconds between two scrapes of --prometheus (15)")
    arguments = parser.parse_args()
    if arguments.prometheus:
        lacking = look(Prometheus(arguments.prometheus), arguments.minutes, arguments.scrape_s, arguments.image)
    else:
        from integration.busy_servers import busy_servers

        with tempfile.TemporaryDirectory() as folder, busy_servers(Path(folder)) as busy:
            busy.work(60 * arguments.minutes)
            lacking = look(busy.prometheus, arguments.minutes, SCRAPE_S, arguments.image)
    print("\n".join([*lacking, f"drawn: {arguments.image}"]))


def look(prometheus: Prometheus, minutes: float, scrape_s: float, image: Path) -> list[str]:
    """Draw the last minutes; what found nothing."""
    now = time.time()
    span = Span(now - 60 * minutes, now, scrape_s)
    answered = ask_all(prometheus, span)
    draw(answered, span, image)
    return report(answered)


if __name__ == "__main__":
    main()
