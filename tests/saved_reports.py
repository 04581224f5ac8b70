"""What the tests need of W&B Reports: a server that keeps them, and their specs read back."""

import json
from dataclasses import dataclass
from typing import Any

from tests.fake_wandb import ENTITY, FakeWandb

PROJECTS = (("team", "proj"), (ENTITY, "proj"))  # that there are


def keep_reports(server: FakeWandb) -> None:
    """Teach the server what `Report.save()` asks; what it keeps, `saved` finds."""

    def internal_id(given: dict[str, Any]) -> dict[str, Any]:
        known = (given["entityName"], given["projectName"]) in PROJECTS
        return {"project": {"id": "p", "internalId": "7"} if known else None}

    def projects(given: dict[str, Any]) -> dict[str, Any]:
        common = {"id": "p", "createdAt": "2026-01-01", "isBenchmark": False, "user": None}
        nodes = [{**common, "name": name, "entityName": entity} for entity, name in PROJECTS if entity == given["entity"]]
        return {"models": {"edges": [{"node": node} for node in nodes], "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def save(given: dict[str, Any]) -> dict[str, Any]:
        owner = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        view = {"id": "VIEW", "type": "runs", "project": owner, "updatedAt": "2026-01-01T00:00:00Z"}
        view |= {key: given[key] for key in ("name", "displayName", "description", "spec")}
        return {"upsertView": {"inserted": True, "view": view}}

    server.answers |= {"GetProjects": projects, "ProjectInternalId": internal_id, "upsertView": save}
    server.answers["GetDefaultEntity"] = lambda given: {"viewer": {"id": "1", "entity": ENTITY}}


def saved(server: FakeWandb) -> dict[str, Any]:
    """The one report: entityName, projectName, displayName, description and the spec."""
    (view,) = [variables for name, variables in server.calls if name == "upsertView"]
    return {**view, "spec": json.loads(view["spec"])}


@dataclass
class Grid:
    """A panel grid as it was saved."""

    runs: dict[str, Any]
    panels: list[dict[str, Any]]

    @property
    def grouping(self) -> list[str]:
        return [f"{key['section']}:{key['name']}" for key in self.runs["grouping"]]

    def holds(self, run: dict[str, Any]) -> bool:
        """Whether the run set has the run {group, jobType, config, summary} in it."""
        assert all(item.get("connector", "AND") == "AND" and not item["disabled"] for item in self.runs["filters"]["filters"])
        for item in self.runs["filters"]["filters"]:
            section, name = item["key"]["section"], item["key"]["name"]
            value = run.get(name) if section == "run" else run[section].get(name)
            if value != item["value"] if item["op"] == "=" else value not in item["value"]:
                return False
        return True


def grids(spec: dict[str, Any]) -> list[Grid]:
    found = []
    for block in spec["blocks"]:
        if block["type"] == "panel-grid":
            (runs,) = block["metadata"]["runSets"]
            found.append(Grid(runs, block["metadata"]["panelBankSectionConfig"]["panels"]))
    return found


def text_of(block: Any) -> str:
    """All text of a block in its order."""
    if isinstance(block, dict):
        return (
            str(block["text"]) if "text" in block else str(block["content"]) if "content" in block else text_of(block.get("children", []))
        )
    return " ".join(map(text_of, block))


def panels(spec: dict[str, Any], kind: str) -> list[tuple[Grid, dict[str, Any]]]:
    return [(grid, panel["config"]) for grid in grids(spec) for panel in grid.panels if panel["viewType"] == kind]
