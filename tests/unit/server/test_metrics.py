from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lamina.engine.messages import PHASE_BUCKETS_S
from lamina.errors import QueueFull
from lamina.server.app import create_app


def scrape(http):
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_page(tools):
    engine = tools.FakeEngine()
    engine.reply = lambda index: "abc"
    app = create_app(engine, served_model_name="m", vllm_metrics=True)
    with tools.Live(app) as live, httpx.Client(base_url=live.url) as http:
        before = scrape(http)
        assert before["lamina_requests_total", "stop"] == 0
        assert before["lamina_engine_up",] == 1
        http.post("/v1/completions", json={"prompt": ["x", "yz"], "n": 2})
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        engine.fail_after = 1
        http.post("/v1/completions", json={"prompt": "x"})
        engine.fail_after = None
        engine.error = QueueFull("full")
        http.post("/v1/completions", json={"prompt": "xxxx"})
        engine.unhealthy = "lost"
        after = scrape(http)

    assert after["lamina_engine_up",] == 0
    assert after["lamina_requests_running",] == 2
    assert after["lamina_requests_waiting",] == 1
    assert after["lamina_kv_pages_used", "attention-1"] == 3
    assert after["lamina_kv_pages_total", "attention-2"] == 12
    assert after["lamina_attention_weight", "attention-1"] == 0.25
    assert after["lamina_attention_weight", "attention-2"] == 0.75
    assert after["lamina_preemptions_total",] == 5
    assert after["lamina_engine_steps_total",] == 7
    assert after["lamina_engine_seconds_total", "attention"] == 1.5
    assert after["lamina_prompt_tokens_total",] == 2 + 3 + 2 + 2  # not the refused one
    assert after["lamina_generated_tokens_total",] == 4 * 3 + 2 + 1
    assert after["lamina_requests_total", "stop"] == 4
    assert after["lamina_requests_total", "length"] == 1
    assert after["lamina_requests_total", "error"] == 1
    assert after["lamina_requests_total", "abort"] == 0
    assert after["lamina_time_to_first_token_seconds_count",] == 4 + 1 + 1
    assert after["lamina_time_between_tokens_seconds_count",] == 4 * 2 + 1
    assert after["lamina_request_seconds_count",] == 2 + 1 + 1
    assert 0 < after["lamina_request_seconds_sum",] < 5

    assert after["vllm:num_requests_running", "m"] == 2
    assert after["vllm:generation_tokens_total", "m"] == after["lamina_generated_tokens_total",]
    assert after["vllm:request_success_total", "m", "stop"] == 4
    assert after["vllm:time_to_first_token_seconds_count", "m"] == 6
    assert after["vllm:kv_cache_usage_perc", "m"] == 0.5


def test_step_phases_are_histograms(http):
    buckets = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name == "lamina_step_phase_seconds_bucket" and sample.labels["phase"] == "model"
    }
    assert len(buckets) == len(PHASE_BUCKETS_S) + 1
    assert (buckets["0.0001"], buckets["0.00025"], buckets["0.0005"]) == (1, 1, 5)
    assert (buckets["10.0"], buckets["+Inf"]) == (5, 7)
    page = scrape(http)
    assert page["lamina_step_phase_seconds_count", "model"] == 7
    assert page["lamina_step_phase_seconds_sum", "model"] == 25.5


def test_aborted_requests_are_counted(http, engine, tools):
    key = ("lamina_requests_total", "abort")
    before = scrape(http)[key]
    engine.delay_s = 0.02
    with http.stream("POST", "/v1/completions", json={"prompt": "x", "n": 2, "stream": True}) as s:
        next(s.iter_lines())
    tools.wait_until(lambda: scrape(http)[key] == before + 2)


def test_a_request_aborted_before_its_first_token_is_counted(http, engine, tools):
    key = ("lamina_requests_total", "abort")
    before = scrape(http)[key]
    engine.hang_after = 0
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"prompt": "x"}, timeout=0.1)
    tools.wait_until(lambda: scrape(http)[key] == before + 1)


def test_vllm_names_only_on_request(http):
    assert "vllm:" not in http.get("/metrics").text
