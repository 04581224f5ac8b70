"""Panels of a W&B Report: bars, curves, scatters and single runs, with run sets in which colours are arms and seeds are averaged.

A run set holds the runs of what was compared and no others: those whose `checkpoint` is in the rows (a pretraining has it in its
summary, an evaluation in its config). It holds one recipe, since a panel averages whatever runs share a readout.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ssl_vit.train.tracking import STEP, Tracking
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.report.text import METRIC_NAMES, WORDS
from ssl_vit_eval.tracking import RESULTS, TRAINED, summary_key

COLUMNS = 24  # of a grid of panels
ALL = 1000  # W&B shows the first ten runs of a panel; a mean over seeds must not leave any out
CURVES = ("loss", "teacher_information", "knn_top1")
KNN, LINEAR = "knn", ("linear", "logreg")  # the first of these that there is is set against k-NN
Keys = dict[tuple[str, str], dict[str, str]]  # of the summary, by dataset and rule and then by read-with


@dataclass(frozen=True)
class Panels:
    """wr: wandb_workspaces.reports.v2. tracking: where the runs are. figures: id of the run that has them, None if there are none."""

    wr: Any
    comparison: Comparison
    tracking: Tracking
    figures: str | None

    def blocks(self) -> list[Any]:
        """Section by section, then what was not trained here: never in one panel with what was."""
        return [block for section in self.comparison.sections for block in self._trained(*section)] + self._others()

    def media(self, key: str) -> Any:
        """The figures that are logged under this key."""
        runs = {**self._project(), "name": "figures", "filters": f"Metric('ID') == {_literal(str(self.figures))}"}
        return self._grid(runs, [self.wr.MediaBrowser(media_keys=[key], num_columns=1)], width=COLUMNS, height=14)

    def _trained(self, method: str, recipe: str) -> list[Any]:
        wr, comparison = self.wr, self.comparison
        arms = [Arm(method, recipe, spec) for spec in comparison.trained_with]
        rows = [row for row in comparison.rows if comparison.arm(row) in arms]
        checkpoints = dict.fromkeys(row.checkpoint for row in rows)
        starts = dict.fromkeys(row.init for row in rows if row.init)
        keys = self._keys(arms)
        logged = {key for run in comparison.runs if run.recipe["method"] == method for record in run.metrics for key in record}
        curves = [
            wr.LinePlot(title=key, x=STEP, y=[key], title_x="step", max_runs_to_show=ALL, **self._averaged("readout"))
            for key in CURVES
            if key in logged or key == "loss"
        ]
        evaluated = self._runs("evaluations", "eval", "Config", [*checkpoints, *starts])
        pretrained = self._runs("pretrainings", "pretrain", "SummaryMetric", checkpoints)
        return [
            wr.H1(arms[0].section),
            wr.P(WORDS["panels"]["bars"]),
            self._grid({**evaluated, "groupby": ["config.trained_with"]}, self._bars(keys, "trained_with"), width=12, height=8),
            wr.P(WORDS["panels"]["curves"]),
            self._grid({**pretrained, "groupby": ["config.readout"]}, curves, width=8, height=7),
            wr.P(WORDS["panels"]["runs"]),
            self._grid(evaluated, [*self._scatters(keys), wr.WeavePanelSummaryTable(table_name=RESULTS)], width=12, height=8),
            wr.P(WORDS["panels"]["recipes"]),
            self._grid(pretrained, [wr.RunComparer(diff_only="split")], width=COLUMNS, height=10),
        ]

    def _others(self) -> list[Any]:
        arms = list(dict.fromkeys(arm for table in self.comparison.tables for arm in self.comparison.others(table)))
        if not arms:
            return []
        checkpoints = dict.fromkeys(row.checkpoint for row in self.comparison.rows if self.comparison.arm(row) in arms)
        runs = {**self._runs("evaluations", "eval", "Config", checkpoints), "groupby": ["config.source"]}
        return [
            self.wr.H1("Not trained here, read out post hoc"),
            self._grid(runs, self._bars(self._keys(arms), "source"), width=12, height=8),
        ]

    def _keys(self, arms: Sequence[Arm]) -> Keys:
        """What the arms were read with. Versions of a rule share a key; the comparison's notes say where there are several."""
        keys: Keys = {}
        for table in self.comparison.tables:
            setting = table.setting
            for spec in self.comparison.read_with:
                if any((arm, spec) in table.cells for arm in arms):
                    key = summary_key(setting.dataset, setting.rule, spec, table.metric)
                    keys.setdefault((setting.dataset, setting.rule), {})[spec] = key
        return keys

    def _bars(self, keys: Keys, by: str) -> list[Any]:
        style = {"max_runs_to_show": ALL, "max_bars_to_show": ALL, **self._averaged(by)}
        return [
            self.wr.BarPlot(title=f"{dataset}, {rule}: {METRIC_NAMES[self._metrics[dataset]]}", metrics=list(of.values()), **style)
            for (dataset, rule), of in keys.items()
        ]

    def _scatters(self, keys: Keys) -> list[Any]:
        """A linear probe against k-NN, each backbone read as it was trained."""
        panels = []
        for dataset in dict.fromkeys(dataset for dataset, _ in keys):
            rules = [KNN, *(rule for rule in LINEAR if (dataset, rule) in keys)][:2]
            if (dataset, KNN) in keys and len(rules) == 2:
                x, y = (self.wr.SummaryMetric(summary_key(dataset, rule, TRAINED, self._metrics[dataset])) for rule in rules)
                panels.append(self.wr.ScatterPlot(title=f"{dataset}: {rules[1]} (y) against {KNN} (x)", x=x, y=y))
        return panels

    @property
    def _metrics(self) -> dict[str, str]:
        """Of each dataset."""
        return {table.setting.dataset: table.metric for table in self.comparison.tables}

    def _averaged(self, by: str) -> dict[str, Any]:
        return {"groupby": self.wr.Config(by), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def _runs(self, name: str, job: str, place: str, checkpoints: Iterable[str]) -> dict[str, Any]:
        """Arguments of a run set."""
        filters = [f"Metric('Group') == {_literal(self.tracking.group)}"] if self.tracking.group else []
        filters += [f"Metric('JobType') == {_literal(job)}", f"{place}('checkpoint') in [{', '.join(map(_literal, checkpoints))}]"]
        return {**self._project(), "name": name, "filters": " and ".join(filters)}

    def _project(self) -> dict[str, Any]:
        return {"entity": self.tracking.entity, "project": self.tracking.project}

    def _grid(self, runs: dict[str, Any], panels: Sequence[Any], width: int, height: int) -> Any:
        for panel in panels:
            panel.layout = self.wr.Layout(w=width, h=height)  # the grid puts them side by side
        return self.wr.PanelGrid(runsets=[self.wr.Runset(**runs)], panels=list(panels))


def _literal(text: str) -> str:
    """A string in a filter, whose parser takes =, < and > for operators inside quotation marks too."""
    return re.sub("[=<>]", lambda found: f"\\x{ord(found[0]):02x}", repr(text))
