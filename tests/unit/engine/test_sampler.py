"""The sampler against straightforward per-row references, its draws against their distribution."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.engine.sampler import Sampler, SamplerRow, prompt_logprobs, uniform
from lamina.types import SamplingParams

EOS = 2


def row(
    *, seed: int = 0, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: object
) -> SamplerRow:
    return SamplerRow(SamplingParams(**params), seed, prompt, output, (EOS,))


def logits_of(*values: float) -> Tensor:
    return torch.tensor([values])


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def one(logits: Tensor, sampler_row: SamplerRow) -> int:
    result = Sampler().sample(logits, [sampler_row])
    assert result.errors == {}
    return result.token_ids[0]


def support(logits: Tensor, *, draws: int = 300, **params: object) -> set[int]:
    """The tokens that are drawn for any of many seeds."""
    rows = [row(seed=s, **params) for s in range(draws)]
    return set(Sampler().sample(logits.expand(draws, -1), rows).token_ids)


def reference_probabilities(logits: Tensor, sampler_row: SamplerRow) -> list[float]:
    """The same rules, one token at a time in double precision."""
    params = sampler_row.params
    x = [float(v) for v in logits]
    counts = Counter(sampler_row.output_token_ids)
    for t in {*sampler_row.prompt_token_ids, *sampler_row.output_token_ids}:
        x[t] = x[t] / params.repetition_penalty if x[t] > 0 else x[t] * params.repetition_penalty
    for t, count in counts.items():
        x[t] -= params.presence_penalty + params.frequency_penalty * count
    if len(sampler_row.output_token_ids) < params.min_tokens:
        for t in (
            *params.stop_token_ids,
            *(() if params.ignore_eos else sampler_row.eos_token_ids),
        ):
            x[t] = -math.inf
    best = max(x)
    weights = [math.exp((v - best) / params.temperature) for v in x]
    order = sorted(range(len(x)), key=lambda t: -weights[t])
    if 0 < params.top_k < len(x):
        order = order[: params.top_k]
    total, mass, nucleus = sum(weights[t] for t in order), 0.0, []
    for t in order:
        if mass >= params.top_p * total:
            break
        nucleus.append(t)
        mass += weights[t]
    kept = [t for t in nucleus if weights[t] >= params.min_p * weights[order[0]]]
    total = sum(weights[t] for t in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(x))]


def reference_choice(logits: Tensor, sampler_row: SamplerRow) -> int:
    u = uniform(sampler_row.seed, len(sampler_row.output_token_ids))
    cumulative = 0.0
    probabilities = reference_probabilities(logits, sampler_row)
    for t, p in enumerate(probabilities):
        cumulative += p
        if cumulative > u:
            return t
    return max(t for t, p in enumerate(probabilities) if p > 0)


# --- greedy -----------------------------------------------------------------------------------


def test_greedy_is_the_first_of_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    result = Sampler().sample(logits, [row(temperature=0.0)] * 2)
    assert result.token_ids == [1, 0]
    assert result.logprobs == [None, None]


def test_an_all_greedy_batch_is_one_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("an all-greedy batch does more than an argmax")

    for name in ("_choose", "_draw", "_token_logprobs"):
        monkeypatch.setattr(f"lamina.engine.sampler.{name}", forbidden)
    assert one(logits_of(0.0, 1.0), row(temperature=0.0, top_p=0.5, top_k=5, min_p=0.5)) == 1


@pytest.mark.parametrize(
    "extra", [{"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1.0}]
)
def test_the_extremes_of_every_knob_are_greedy(extra: dict[str, float]) -> None:
    logits = random_logits(20, 50)
    result = Sampler().sample(logits, [row(seed=s, **extra) for s in range(20)])
    assert result.token_ids == logits.argmax(-1).tolist()


def test_no_rows() -> None:
    assert Sampler().sample(torch.empty(0, 7), []) == ([], [], {})


def test_the_callers_logits_are_not_changed() -> None:
    logits = random_logits(2, 20)
    before = logits.clone()
    rows = [
        row(repetition_penalty=2.0, presence_penalty=1.0, output=(1, 2), min_tokens=9, top_p=0.5),
        row(temperature=0.0, frequency_penalty=1.0, output=(3,), logprobs=2),
    ]
    Sampler().sample(logits, rows)
    assert torch.equal(logits, before)


# --- random choice ----------------------------------------------------------------------------

ROWS = st.builds(
    row,
    seed=st.integers(-(2**63), 2**63 - 1),
    prompt=st.lists(st.integers(0, 39), max_size=6).map(tuple),
    output=st.lists(st.integers(0, 39), max_size=6).map(tuple),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 2, 5, 39, 40, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.8]),
    min_tokens=st.sampled_from([0, 3, 7]),
    stop_token_ids=st.sampled_from([(), (5, 11)]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_matches_the_reference_in_every_batch(rows: list[SamplerRow], seed: int) -> None:
    logits = random_logits(len(rows), 40, seed)
    expected = [reference_choice(logits[r], rows[r]) for r in range(len(rows))]
    assert Sampler().sample(logits, rows) == (expected, [None] * len(rows), {})
    alone = [one(logits[r : r + 1], rows[r]) for r in range(len(rows))]
    assert alone == expected


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1, "top_k": 9, "top_p": 0.95},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, float]) -> None:
    num_draws = 20_000
    logits = random_logits(1, 12, seed=5, scale=1.0)
    rows = [row(seed=s % 100, output=(0,) * (s // 100), **params) for s in range(num_draws)]
    counts = Counter(Sampler().sample(logits.expand(num_draws, -1), rows).token_ids)
    probabilities = reference_probabilities(logits[0], row(**params))
    assert set(counts) <= {t for t, p in enumerate(probabilities) if p > 0}
    expected = [p * num_draws for p in probabilities if p > 0]
    observed = [counts[t] for t, p in enumerate(probabilities) if p > 0]
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(expected) - 1
    # Wilson and Hilferty's approximation of the 99.9 % quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = torch.tensor(
        [[uniform(s, p) for p in range(100)] for s in range(-50, 50)], dtype=torch.float64
    )
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    assert numbers.unique().numel() == 10_000
    deciles = torch.histc(numbers, bins=10, min=0.0, max=1.0)
    assert float((deciles - 1000).abs().max()) < 4 * math.sqrt(900)
    centred = numbers - 0.5
    for neighbours in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(neighbours.mean())) < 4 / 12 / math.sqrt(neighbours.numel())


def test_uniform_is_fixed_for_ever() -> None:
    assert uniform(0, 0) == 0.8833108082136426  # SplitMix64's first number of seed 0
    assert uniform(1, 0) != uniform(0, 1)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


def test_a_rebuilt_sequence_draws_the_same_tokens() -> None:
    logits = random_logits(1, 500, scale=0.5)
    outputs: list[int] = []
    for _ in range(20):
        outputs.append(one(logits, row(seed=7, output=tuple(outputs))))
    assert len(set(outputs)) > 10
    assert one(logits, row(seed=7, output=tuple(outputs[:11]))) == outputs[11]


def test_top_k_beyond_the_vocabulary_is_off() -> None:
    logits = torch.zeros(1, 5)
    assert support(logits, top_k=1000) == support(logits) == {0, 1, 2, 3, 4}


def test_tokens_that_tie_with_the_last_kept_are_kept() -> None:
    logits = logits_of(1.0, 2.0, 1.0, -3.0)
    assert support(logits, top_k=2) == {0, 1, 2}
    assert support(logits, top_p=0.6) == {0, 1, 2}


def test_top_p_counts_what_top_k_leaves() -> None:
    # Of the two best (0.4, 0.2), the first alone has two thirds.
    logits = torch.tensor([[0.4, 0.2, 0.15, 0.15, 0.1]]).log()
    assert support(logits, top_k=2, top_p=0.6) == {0}
    assert support(logits, top_p=0.6) == {0, 1}


def test_min_p_is_relative_to_the_best() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert support(logits, min_p=0.29) == {0, 1, 2}
    assert support(logits, min_p=0.31) == {0, 1}


def test_a_nucleus_wider_than_the_first_look() -> None:
    logits = random_logits(3, 5000, scale=0.1)
    rows = [row(seed=3, top_p=0.9), row(seed=4, top_p=0.9, top_k=3000), row(seed=5, top_p=0.01)]
    expected = [reference_choice(logits[r], rows[r]) for r in range(3)]
    assert Sampler().sample(logits, rows).token_ids == expected


# --- penalties and min_tokens -------------------------------------------------------------------


def test_repetition_penalty_covers_prompt_and_output() -> None:
    logits = logits_of(4.0, 3.9, 3.0, -1.0)
    assert one(logits, row(temperature=0.0, prompt=(0,), output=(1,), repetition_penalty=1.5)) == 2
    negative = logits_of(-1.0, -1.5)
    assert one(negative, row(temperature=0.0, prompt=(0,), repetition_penalty=2.0)) == 1


def test_presence_penalty_ignores_counts_and_the_prompt() -> None:
    logits = logits_of(2.0, 1.0, 0.5)
    assert one(logits, row(temperature=0.0, prompt=(0,), presence_penalty=1.2)) == 0
    assert one(logits, row(temperature=0.0, output=(0, 0, 0), presence_penalty=0.9)) == 0
    assert one(logits, row(temperature=0.0, output=(0,), presence_penalty=1.2)) == 1


def test_frequency_penalty_grows_with_the_count() -> None:
    logits = logits_of(2.0, 1.0)
    assert one(logits, row(temperature=0.0, output=(0, 1), frequency_penalty=0.6)) == 0
    assert one(logits, row(temperature=0.0, output=(0, 0, 1), frequency_penalty=1.1)) == 1
    assert one(logits, row(temperature=0.0, prompt=(0, 0, 0), frequency_penalty=1.1)) == 0


def test_min_tokens_forbids_the_end() -> None:
    logits = logits_of(0.0, 1.0, 5.0, 4.0)
    knobs = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (3, 10**6)}
    assert one(logits, row(**knobs)) == 1
    assert one(logits, row(output=(0,), **knobs)) == 1
    assert one(logits, row(output=(0, 0), **knobs)) == EOS
    assert one(logits, row(ignore_eos=True, **knobs)) == EOS


# --- logprobs -----------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3, 30)
    plain = logits.log_softmax(-1)
    rows = [
        row(temperature=0.3, top_k=2, output=(1, 2), presence_penalty=2.0, logprobs=3, seed=11),
        row(temperature=0.0),
        row(temperature=0.0, logprobs=0),
    ]
    tokens, logprobs, _ = Sampler().sample(logits, rows)
    assert logprobs[1] is None
    first, last = logprobs[0], logprobs[2]
    assert first is not None
    assert last is not None
    assert first.token_id == tokens[0]
    assert first.logprob == pytest.approx(float(plain[0, tokens[0]]))
    assert [t for t, _ in first.top] == plain[0].argsort(descending=True)[:3].tolist()
    assert [v for _, v in first.top] == pytest.approx(
        plain[0].sort(descending=True).values[:3].tolist()
    )
    assert (last.rank, last.top) == (1, ())


def test_ranks_and_ties() -> None:
    logits = logits_of(1.0, 3.0, 3.0, 2.0)
    entries = prompt_logprobs(logits.expand(4, -1), [0, 1, 2, 3], 2)
    assert [e.rank for e in entries] == [4, 1, 1, 3]
    assert [t for t, _ in entries[0].top] == [1, 2]


def test_prompt_logprobs() -> None:
    logits = random_logits(4, 9)
    entries = prompt_logprobs(logits, [3, 1, 8, 0], 20)
    plain = logits.log_softmax(-1)
    assert [e.logprob for e in entries] == pytest.approx(
        [float(plain[r, t]) for r, t in enumerate([3, 1, 8, 0])]
    )
    assert all(len(e.top) == 9 for e in entries)
    assert prompt_logprobs(torch.empty(0, 9), [], 3) == []


# --- bad logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_fail_only_their_row(bad: float, temperature: float) -> None:
    logits = random_logits(3, 10)
    expected = Sampler().sample(logits, [row(temperature=temperature, logprobs=1)] * 3)
    broken = logits.clone()
    broken[1, 4] = bad
    result = Sampler().sample(broken, [row(temperature=temperature, logprobs=1)] * 3)
    assert list(result.errors) == [1]
    assert "NaN or infinite" in result.errors[1]
    assert (result.token_ids[1], result.logprobs[1]) == (-1, None)
    for r in (0, 2):
        assert result.token_ids[r] == expected.token_ids[r]
        assert result.logprobs[r] == expected.logprobs[r]


def test_a_row_without_any_possible_token_is_an_error() -> None:
    result = Sampler().sample(torch.full((1, 4), -math.inf), [row(temperature=0.0)])
    assert list(result.errors) == [0]
    for temperature in (0.0, 1.0):
        everything = row(temperature=temperature, min_tokens=1, stop_token_ids=(0, 1, 2, 3))
        result = Sampler().sample(torch.zeros(1, 4), [everything])
        assert "min_tokens" in result.errors[0]
        assert result.token_ids == [-1]
