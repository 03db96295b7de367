"""Timelines of a pipeline of which every duration is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lamina.engine.events import AttentionMark, ModelMark, StepRecord, WorkerTimes


class Durations(NamedTuple):
    """Seconds of each part of a layer, and of the engine's work on a step."""

    q: float = 2e-3
    send_q: float = 1e-4
    kv: float = 1e-3
    send_kv: float = 2e-4
    deferred: float = 0.0
    last: float = 3e-3
    hop: float = 5e-4
    attend: float = 6e-3
    finish: float = 4e-4
    plan: float = 1e-4
    sample: float = 3e-4


def pipeline(
    durations: Durations,
    *,
    num_micro_batches: int,
    num_layers: int = 4,
    num_steps: int = 6,
    attention_worker: str = "attention-worker-1",
    start_s: float = 1000.0,
) -> list[StepRecord]:
    """The steps of one model worker and one attention worker, in the order in which they end.

    Both work on what is there first. The engine plans and samples in the model worker's thread.
    """
    d = durations
    model_free = attention_free = start_s
    records: list[StepRecord] = []
    running = {m: _Running(m + 1, num_layers, start_s, start_s) for m in range(num_micro_batches)}
    next_step = num_micro_batches + 1
    while len(records) < num_steps * num_micro_batches:
        # The one whose input is there first; of several the one that waits for longest.
        micro_batch = min(running, key=lambda m: running[m].ready_s)
        now = running[micro_batch]
        turned, begin = model_free, max(model_free, now.ready_s)
        if now.layer == 0:
            now.begin_s = begin
            now.planned_s = turned = begin = begin + d.plan
        row = now.model[now.layer]
        if now.layer == num_layers:
            row[:] = begin + d.last
            row[ModelMark.WAIT], row[ModelMark.BEGIN] = turned, begin
            logits_s = begin + d.last
            model_free = logits_s + d.sample
            records.append(
                StepRecord(
                    step=now.step,
                    micro_batch=micro_batch,
                    num_rows=8,
                    begin_s=now.begin_s,
                    planned_s=now.planned_s,
                    logits_s=logits_s,
                    end_s=model_free,
                    model=(WorkerTimes("model", now.model),),
                    attention=(WorkerTimes(attention_worker, now.attention),),
                )
            )
            running[micro_batch] = _Running(next_step, num_layers, model_free, model_free)
            next_step += 1
            continue
        row[:] = [turned, begin, *(begin + np.cumsum([d.q, d.send_q, d.kv, d.send_kv, d.deferred]))]
        model_free = float(row[ModelMark.DONE])
        attend = max(attention_free, float(row[ModelMark.Q_SENT]) + d.hop)
        finish = max(attend + d.attend, float(row[ModelMark.KV_SENT]) + d.hop)
        attention_free = finish + d.finish
        marks = now.attention[now.layer]
        marks[AttentionMark.ATTEND_BEGIN] = attend
        marks[AttentionMark.ATTEND_END] = attend + d.attend
        marks[AttentionMark.FINISH_BEGIN] = finish
        marks[AttentionMark.FINISH_END] = attention_free
        now.layer += 1
        now.ready_s = attention_free + d.hop
    return records


class _Running:
    def __init__(self, step: int, num_layers: int, ready_s: float, begin_s: float) -> None:
        self.step = step
        self.layer = 0
        self.ready_s = ready_s
        self.begin_s = begin_s
        self.planned_s = begin_s
        self.model = np.zeros((num_layers + 1, len(ModelMark)))
        self.attention = np.zeros((num_layers, len(AttentionMark)))
