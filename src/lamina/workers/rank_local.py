"""A rank's local executor: prompts in progress attend where their slices run.

Layer l of a micro-batch is served by the replica that runs slice l; the output goes to the replica
that runs slice l + 1, over the ring's link and ahead of the context. With one replica that is this
rank.
"""

from __future__ import annotations

import numpy as np

from lamina.attention.executor import AttentionExecutor
from lamina.convert import SlicedModel
from lamina.transport.inproc import inproc_pair
from lamina.transport.topology import step_mailboxes
from lamina.types import LOCAL, ExecutorPlan
from lamina.workers.plans import PlanEnd, Times
from lamina.workers.rank_links import RankLinks
from lamina.workers.routes import ExecutorEnd
from lamina.workers.serving import ExecutorServer, Turn


class LocalServing:
    """The local executor, both ends of its link, and the links that its outputs take."""

    def __init__(self, links: RankLinks, model: SlicedModel, turn: Turn) -> None:
        """
        Args:
            turn: which replica this is, of how many.
        """
        assign, specs = links.assign, model.attention_specs
        self.executor: AttentionExecutor = links.local
        ours, theirs = inproc_pair("model-rank", "local", lambda: self._server.loop.pump())
        self._server = ExecutorServer(
            theirs,
            links.local,
            dtype=model.dtype,
            max_rows=assign.max_rows,
            max_spans=assign.max_spans,
            step_deadline_s=assign.step_deadline_s,
            num_micro_batches=assign.num_micro_batches,
            turn=turn,
            out_link=links.following,
        )
        self.end = ExecutorEnd(
            LOCAL,
            ours,
            specs,
            dtype=model.dtype,
            max_rows=assign.max_rows,
            page_units=links.local.units,
            num_micro_batches=assign.num_micro_batches,
            num_units=links.local.units,
            out_link=links.previous,
        )
        self._plans = PlanEnd(
            LOCAL,
            ours,
            step_mailboxes(specs, model.dtype.itemsize, assign.max_rows, assign.num_micro_batches),
            max_spans=assign.max_spans,
            on_plan=self._server.take_plan,
        )
        self._num_messages = [0] * assign.num_micro_batches
        self._reports: dict[int, Times] = {}
        self._no_report: Times = np.zeros((len(specs), 4))

    def begin(self, part: ExecutorPlan, deadline: float) -> None:
        """Take up a step's plan, of this rank's head units."""
        attends = any(span.num_attending for span in part.spans)
        stores = any(span.num_stored for span in part.spans)
        self._num_messages[part.micro_batch] = attends + stores
        self._plans.post(part, deadline)

    def end_step(self, micro_batch: int, step: int) -> Times:
        """What the executor reports on the micro-batch's step, which is through here."""
        self._num_messages[micro_batch] = 0
        self._reports.update({r.step: r.times for r in self._plans.take_reports()})
        return self._reports.pop(step, self._no_report)

    def run_layer(self, micro_batch: int) -> None:
        """Serve the layer whose q, k and v were just posted, so that its output is on its way."""
        for _ in range(self._num_messages[micro_batch]):
            self._server.loop.pump()
