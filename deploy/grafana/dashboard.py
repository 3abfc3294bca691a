"""Writes Grafana's dashboard: `python deploy/grafana/dashboard.py > deploy/grafana/dashboards/perft.json`.

Change the panels in `rows.py`, never in the JSON.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from rows import ROWS, YES_NO, Panel, Query, S

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHTS = {"stat": 4, "timeseries": 8, "state-timeline": 8, "table": 9}
LOW = {"Alerts that fire": 4, "Servers now": 5}


def field_config(panel: Panel) -> dict[str, Any]:
    steps = [{"color": color, "value": value if number else None} for number, (value, color) in enumerate(panel.steps)]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.type == "stat":
        defaults |= {"color": {"mode": "thresholds"}, "noValue": "-"}
    elif panel.type == "timeseries":
        defaults |= {"color": {"mode": "palette-classic"}, "min": 0, "custom": lines(panel)}
    elif panel.type == "state-timeline":
        defaults |= {"color": {"mode": "thresholds"}, "custom": {"fillOpacity": 80, "lineWidth": 0}}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    mappings = value_mappings(panel.mappings)
    if panel.type == "state-timeline":
        defaults["mappings"] = mappings
    overrides = [
        override(name, "color", {"mode": "fixed", "fixedColor": color}) for name, color in panel.colors.items()
    ]
    overrides += [override(column, "unit", unit) for column, unit in panel.units.items()]
    if panel.type == "table" and mappings:
        column = "ready" if panel.mappings is YES_NO else "is on"
        overrides.append(override(column, "mappings", mappings))
        overrides[-1]["properties"].append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
    if panel.link:
        target = {"title": "Open in the console", "url": "${console}#/adapters/${__value.raw}", "targetBlank": True}
        overrides.append(override(panel.link, "links", [target]))
    return {"defaults": defaults, "overrides": overrides}


def lines(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "bars" if panel.bars else "line",
        "lineWidth": 0 if panel.bars else 1,
        "fillOpacity": 80 if panel.bars else 8 if panel.stack == "none" else 35,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": panel.stack, "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.lines_at_steps else "off"},
    }


def value_mappings(mappings: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    if not mappings:
        return []
    options = {
        value: {"text": text, "color": color, "index": number}
        for number, (value, (text, color)) in enumerate(mappings.items())
    }
    return [{"type": "value", "options": options}]


def override(name: str, setting: str, value: Any) -> dict[str, Any]:
    return {"matcher": {"id": "byName", "options": name}, "properties": [{"id": setting, "value": value}]}


def options_of(panel: Panel) -> dict[str, Any]:
    if panel.type == "stat":
        calculation = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": calculation, "colorMode": "background", "graphMode": "area", "textMode": "value"}
    if panel.type == "timeseries":
        legend = {
            "displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"],
            "sortBy": "Max", "sortDesc": True,
        }  # fmt: skip
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.type == "state-timeline":
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []}
        return {"mergeValues": True, "showValue": "never", "rowHeight": 0.8, "legend": legend}
    return {"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": panel.queries[0].column, "desc": True}]}


def transformations(panel: Panel) -> list[dict[str, Any]]:
    """Of a table: the answers, one for each column, become one line for each adapter or server."""
    names = {f"Value #{letter}": query.column for letter, query in lettered(panel)}
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
    ]


def lettered(panel: Panel) -> Iterator[tuple[str, Query]]:
    return zip("ABCDEFGHIJKLMNOP", panel.queries, strict=False)


def panel_json(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    now = panel.type == "table"
    targets = [
        {
            "refId": letter, "datasource": SOURCE, "editorMode": "code", "expr": query.expr,
            "legendFormat": query.legend, "range": not now, "instant": now, "format": "table" if now else "time_series",
        }
        for letter, query in lettered(panel)
    ]  # fmt: skip
    made = {
        "id": number, "type": panel.type, "title": panel.title, "description": panel.description, "datasource": SOURCE,
        "gridPos": place, "fieldConfig": field_config(panel), "options": options_of(panel), "targets": targets,
    }  # fmt: skip
    return made | ({"transformations": transformations(panel)} if now else {})


def panels() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        x, y, height = 0, y + 1, 0
        for width, panel in row:
            if x + width > 24:
                x, y, height = 0, y + height, 0
            height = max(height, LOW.get(panel.title, HEIGHTS[panel.type]))
            made.append(panel_json(panel, len(made) + 1, {"h": height, "w": width, "x": x, "y": y}))
            x += width
        y += height
    return made


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": f"{name}-variable", "qryType": 1}, "refresh": 2, "sort": 1, "multi": True,
        "includeAll": True, "allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [], "hide": 0, "regex": "", "skipUrlSync": False,
    }  # fmt: skip


def variables() -> list[dict[str, Any]]:
    source = {
        "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
        "current": {"selected": False, "text": "Prometheus", "value": "perft-prometheus"}, "options": [], "hide": 0,
        "includeAll": False, "multi": False, "refresh": 1, "regex": "", "skipUrlSync": False,
    }  # fmt: skip
    counts = [{"text": count, "value": count, "selected": count == "10"} for count in ("5", "10", "25", "100")]
    most = {
        "name": "top", "label": "Lines", "type": "custom", "query": "5,10,25,100", "options": counts,
        "current": counts[1], "includeAll": False, "multi": False, "hide": 0, "skipUrlSync": False,
    }  # fmt: skip
    url = {"text": "http://127.0.0.1:8000/", "value": "http://127.0.0.1:8000/", "selected": True}
    console = {
        "name": "console", "label": "Console", "type": "textbox", "query": url["value"], "current": url,
        "options": [url], "hide": 0, "skipUrlSync": False,
    }  # fmt: skip
    adapters = f"label_values(perft_adapter_requests_total{{{S}}}, adapter)"
    return [
        source,
        variable("instance", "Server", 'label_values(up{job="perft"}, instance)'),
        variable("adapter", "Adapter", adapters),
        most,
        console,
    ]


def annotations() -> list[dict[str, Any]]:
    own = {"type": "grafana", "uid": "-- Grafana --"}
    return [
        {
            "builtIn": 1, "datasource": own, "enable": True, "hide": True, "iconColor": "rgba(0, 211, 255, 1)",
            "name": "Annotations & Alerts", "type": "dashboard",
        },
        {
            "datasource": SOURCE, "enable": True, "hide": False, "iconColor": "red", "name": "Alerts",
            "expr": 'ALERTS{alertname=~"Perft.*",alertstate="firing"}', "titleFormat": "{{alertname}}",
            "textFormat": "{{instance}} {{adapter}}", "step": "60s",
        },
    ]  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana reads it."""
    link = {
        "title": "Console", "type": "link", "url": "${console}", "icon": "external link", "targetBlank": True,
        "tooltip": "The server's own page: upload, activate, try out", "asDropdown": False, "tags": [],
        "includeVars": False, "keepTime": False,
    }  # fmt: skip
    return {
        "uid": "perft-adapters",
        "title": "PERFT adapters",
        "description": "Adapters served beside one base model: health, requests, latency, residency, store, servers.",
        "tags": ["perft", "vllm"],
        "schemaVersion": 39,
        "version": 2,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "weekStart": "",
        "fiscalYearStartMonth": 0,
        "liveNow": False,
        "links": [link],
        "annotations": {"list": annotations()},
        "templating": {"list": variables()},
        "panels": panels(),
    }


def main() -> None:
    json.dump(dashboard(), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
