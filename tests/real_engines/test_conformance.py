"""What every engine must do, whichever it is: one suite for all of them, against the real thing.

    bash tests/run.sh engines              all engines
    bash tests/run.sh tests/real_engines/test_conformance.py -k vllm

The lane "sglang" is SGLang on CPU with a stand-in for its kernels (`sglang_stand_in/`). Nothing
here shows CUDA kernels, CUDA IPC, or that memory is released by `sleep`.
"""

import asyncio

import pytest
import torch
from transformers import TopPLogitsWarper

from RL2.datasets.end_of_turn import EndTokens
from RL2.engines.protocol import SamplingParams
from RL2.runtime.errors import EngineError
from tests.real_engines.support import TOLERANCE, in_the_middle, side_of_abort, side_of_update
from tests.rollout.support import action_text, make_tokenizer, reference_logps


def sampling(temperature=1.0, max_new_tokens=24, **options):
    return SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, **options)


def encode(text):
    return make_tokenizer().encode(text, add_special_tokens=False)


def ask(running, prompts, params, seeds=None):
    """Completions of all prompts (texts or ids), asked for at once."""
    ids = [encode(p) if isinstance(p, str) else p for p in prompts]
    seeds = range(len(ids)) if seeds is None else seeds

    async def all_of_them():
        return await asyncio.gather(
            *(running.engine.generate(i, params, seed=s) for i, s in zip(ids, seeds, strict=True))
        )

    return running.run(all_of_them())


def assert_logps(completion, model, prompt, temperature):
    ids = encode(prompt) if isinstance(prompt, str) else prompt
    expected = reference_logps(model, ids, completion.token_ids, temperature)
    error = (torch.tensor(completion.logps) - expected).abs().max().item()
    assert error < TOLERANCE, f"{error} nats from the model's own log-probabilities"


PROMPTS = [f"{'ab' * (i % 7)} question {i}: " for i in range(16)]


# ------------------------------------------------------------------------ what is written


def test_greedy_is_deterministic_alone_and_in_company(running):
    params = sampling(temperature=0.0)
    together = ask(running, PROMPTS, params)
    for prompt, expected in list(zip(PROMPTS, together, strict=True))[:4]:
        (alone,) = ask(running, [prompt], params, seeds=[99])
        assert alone.token_ids == expected.token_ids
    model = running.model()
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = encode(prompt) + completion.token_ids
        logits = model(torch.tensor([ids])).logits[0, len(encode(prompt)) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion.token_ids


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (1.0, 0.8)])
def test_logps_are_the_models(running, temperature, top_p):
    model = running.model()
    answers = ask(running, PROMPTS, sampling(temperature, top_p=top_p))
    for prompt, completion in zip(PROMPTS, answers, strict=True):
        assert len(completion.logps) == len(completion.token_ids) > 0
        assert_logps(completion, model, prompt, temperature)


def test_samples_differ_by_seed_and_repeat_with_it(running):
    params = sampling(max_new_tokens=16)
    first = ask(running, ["same prompt"] * 16, params, seeds=range(16))
    again = ask(running, ["same prompt"] * 16, params, seeds=range(16))
    assert len({tuple(c.token_ids) for c in first}) == 16
    assert [c.token_ids for c in first] == [c.token_ids for c in again]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_samples_follow_the_distribution(running, temperature, top_p):
    """First tokens of many samples: total variation to the model's own distribution."""
    prompt, n = "distribution", 512
    params = sampling(temperature, max_new_tokens=1, top_p=top_p)
    counts = torch.zeros(259)
    for completion in ask(running, [prompt] * n, params, seeds=range(n)):
        counts[completion.token_ids[0]] += 1
    ids = torch.tensor([encode(prompt)])
    scores = running.model()(ids).logits[:, -1].float() / temperature
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
        assert scores.isinf().sum() > 20  # the nucleus leaves something out
    probabilities = scores[0].softmax(-1)
    assert not counts[probabilities == 0].any()
    # n samples of the right distribution: 1/2 sum sqrt(2 p (1 - p) / (pi n)) expected
    expected = (2 * probabilities * (1 - probabilities) / (torch.pi * n)).sqrt().sum() / 2
    distance = (counts / n - probabilities).abs().sum() / 2
    assert distance < 1.3 * expected, (distance, expected)


def test_max_tokens_are_exact(running):
    for length in (1, 7):
        (completion,) = ask(running, ["count"], sampling(0.0, max_new_tokens=length))
        assert len(completion.token_ids) == length
        assert completion.finish_reason == "length"


def test_end_of_sequence_ends_and_is_written(running):
    """Every end-of-sequence token of the checkpoint's generation config counts."""
    answers = ask(running, PROMPTS * 8, sampling(max_new_tokens=64))
    stopped = [c for c in answers if c.finish_reason == "stop"]
    assert len(stopped) > 20
    ends = {1, *range(60, 64)}
    assert all(c.token_ids[-1] in ends for c in stopped)
    assert len({c.token_ids[-1] for c in stopped}) > 1
    assert all(not ends & set(c.token_ids[:-1]) for c in answers)


def ascii_pair(completion):
    """Two printable ASCII characters in a row somewhere in the middle of a response."""
    texts = [make_tokenizer().decode([token]) for token in completion.token_ids]
    pairs = [one + two for one, two in zip(texts[3:], texts[4:-1], strict=False)]
    return next((pair for pair in pairs if pair.isascii() and pair.isprintable()), None)


def test_a_stop_string_ends_and_stays_in_the_tokens(running):
    tokenizer = make_tokenizer()
    answers = zip(PROMPTS, ask(running, PROMPTS, sampling(0.0)), strict=True)
    prompt, free, stop = next((p, c, pair) for p, c in answers if (pair := ascii_pair(c)))
    end = tokenizer.decode(free.token_ids).index(stop)
    params = sampling(0.0, stop=(stop,), no_stop_trim=False)
    (completion,) = ask(running, [prompt], params)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
    assert tokenizer.decode(completion.token_ids).endswith(stop)
    assert action_text(completion, params, tokenizer) == tokenizer.decode(free.token_ids)[:end]


def test_a_token_that_the_request_names_ends_it_and_stays(running):
    tokenizer = make_tokenizer()
    answers = zip(PROMPTS, ask(running, PROMPTS, sampling(0.0)), strict=True)
    prompt, free = max(answers, key=lambda answer: len(answer[1].token_ids))
    token = free.token_ids[len(free.token_ids) // 2]
    first = free.token_ids.index(token)
    params = sampling(0.0, stop_token_ids=(token, 63))
    (completion,) = ask(running, [prompt], params)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == free.token_ids[: first + 1]
    ends = EndTokens(ids=params.stop_token_ids)
    assert action_text(completion, params, tokenizer, ends) == tokenizer.decode(
        free.token_ids[:first]
    )


def test_unicode_goes_through(running):
    prompt = "Ünïcödé 数学 🙂 \u202e\u0000 é"
    model = running.model()
    (completion,) = ask(running, [prompt], sampling())
    assert_logps(completion, model, prompt, 1.0)
    # A stop string of several bytes that the response is unlikely to spell does no harm.
    (other,) = ask(running, [prompt], sampling(stop=("数学", "🙂")))
    assert other.token_ids == completion.token_ids


def test_a_prompt_at_the_context_limit(running):
    length = running.engine.context_length
    assert length == 512
    prompt = [3 + i % 200 for i in range(length - 8)]
    (completion,) = ask(running, [prompt], sampling(0.0, max_new_tokens=8))
    assert len(completion.token_ids) == 8 or completion.finish_reason == "stop"
    assert_logps(completion, running.model(), prompt, 0.0)
    with pytest.raises(EngineError, match="max_new_tokens=9"):
        ask(running, [prompt], sampling(0.0, max_new_tokens=9))


def test_an_empty_prompt_is_an_error(running):
    with pytest.raises(EngineError, match="no tokens"):
        ask(running, [[]], sampling())


def test_256_requests_at_once(running):
    prompts = [f"{'x' * (i % 50)} {i}" for i in range(256)]
    lengths = [1 + i % 40 for i in range(256)]

    async def all_of_them():
        return await asyncio.gather(
            *(
                running.engine.generate(encode(p), sampling(max_new_tokens=n), seed=i)
                for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
            )
        )

    answers = running.run(all_of_them())
    model = running.model()
    for i, completion in enumerate(answers):
        stopped = completion.finish_reason == "stop"
        assert stopped or len(completion.token_ids) == lengths[i]
        if i % 16 == 0:
            assert_logps(completion, model, prompts[i], 1.0)


# ------------------------------------------------------------------------ abort, pause


LONG = sampling(max_new_tokens=440)


def begin(running, prompts):
    """Long completions of prompts, as tasks (on the engine's event loop)."""
    return [
        asyncio.create_task(running.engine.generate(encode(prompt), LONG, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]


def test_abort_brings_back_what_there_is(running):
    prompts = [f"abort {i}" for i in range(64)]
    model = running.model()

    async def play(delay):
        tasks = begin(running, prompts)
        await asyncio.sleep(delay)
        await running.engine.abort()
        return await asyncio.wait_for(asyncio.gather(*tasks), 30)

    def attempt(delay):
        answers = running.run(play(delay))
        aborted = [i for i, c in enumerate(answers) if c.finish_reason == "abort"]
        for i in aborted:
            assert len(answers[i].token_ids) == len(answers[i].logps) < 440
            if answers[i].token_ids:
                assert_logps(answers[i], model, prompts[i], 1.0)
        return side_of_abort(answers)

    for delay in (0.0, 0.003, 0.01, 0.03):  # before, at and after the first tokens
        attempt(delay)
    in_the_middle(attempt)
    (after,) = ask(running, ["after"], sampling())
    assert after.finish_reason != "abort"


def test_pause_holds_and_resume_goes_on(running):
    prompts = [f"pause {i}" for i in range(64)]

    async def play(delay):
        tasks = begin(running, prompts)
        await asyncio.sleep(delay)
        await running.engine.pause()
        await asyncio.sleep(1.0)  # answers that were on their way
        done = sum(task.done() for task in tasks)
        late = asyncio.create_task(running.engine.generate(encode("late"), LONG, seed=0))
        await asyncio.sleep(2.0)
        held = done == sum(task.done() for task in tasks) and not late.done()
        await running.engine.resume()
        return held, done, await asyncio.wait_for(asyncio.gather(*tasks, late), 120)

    model = running.model()

    def attempt(delay):
        held, done, answers = running.run(play(delay))
        assert held
        assert all(c.finish_reason in ("stop", "length") for c in answers)
        for prompt, completion in zip([*prompts, "late"], answers, strict=True):
            assert_logps(completion, model, prompt, 1.0)
        return 0 if done < len(prompts) else 1

    in_the_middle(attempt)


# ------------------------------------------------------------------------ weights


def test_new_weights_are_served(running):
    try:
        old, new = running.model(), running.model(running.other)
        prompts = PROMPTS[:8]
        before = ask(running, prompts, sampling(0.0))
        running.publish(running.other, 11)
        assert running.engine.weight_version == 11
        # The same prompts again: nothing that was cached for them may answer.
        after = ask(running, prompts, sampling(0.0))
        for prompt, one, two in zip(prompts, before, after, strict=True):
            assert_logps(two, new, prompt, 0.0)
            assert two.weight_versions == [11] * len(two.token_ids)
            assert one.token_ids != two.token_ids
            with pytest.raises(AssertionError, match="nats"):
                assert_logps(two, old, prompt, 0.0)
    finally:
        running.publish(running.folder, 0)
    again = ask(running, prompts, sampling(0.0))
    assert [c.token_ids for c in again] == [c.token_ids for c in before]


def test_new_weights_while_paused(running):
    prompts = [f"paused {i}" for i in range(16)]
    old, new = running.model(), running.model(running.other)

    async def play(delay):
        tasks = begin(running, prompts)
        await asyncio.sleep(delay)
        await running.engine.pause()
        await running.engine.update_weights(new.named_parameters(), 12)
        await running.engine.resume()
        return await asyncio.wait_for(asyncio.gather(*tasks), 120)

    def attempt(delay):
        try:
            answers = running.run(play(delay))
            for prompt, completion in zip(prompts, answers, strict=True):
                check_versions(old, prompt, completion)
            (fresh,) = ask(running, ["fresh"], sampling())
            assert_logps(fresh, new, "fresh", 1.0)
        finally:
            running.publish(running.folder, 0)
        return side_of_update((c.weight_versions for c in answers), before=0)

    in_the_middle(attempt)


def check_versions(old, prompt, completion):
    """Tokens of version 0 come first and are the old model's."""
    versions = completion.weight_versions
    assert versions == sorted(versions)
    assert set(versions) <= {0, 12}
    n_old = versions.count(0)
    expected = reference_logps(old, encode(prompt), completion.token_ids, 1.0)[:n_old]
    difference = torch.tensor(completion.logps[:n_old]) - expected
    assert not n_old or difference.abs().max() < TOLERANCE


def test_a_parameter_that_is_missing_is_named(running):
    model = running.model()
    named = [(n, p) for n, p in model.named_parameters() if "up_proj" not in n]
    with pytest.raises(EngineError, match="up_proj.weight is missing"):
        running.run(running.engine.update_weights(named, 13))
    running.publish(running.folder, 0)


def test_sleep_and_wake(running):
    """Where there is memory to release; elsewhere both do nothing."""
    if running.name != "transformers":
        pytest.skip(f"{running.name} cannot sleep on a CPU: validated configs never ask it to")

    async def play():
        await running.engine.sleep()
        await running.engine.sleep()
        await running.engine.wake()
        await running.engine.wake()

    running.run(play())
    (completion,) = ask(running, ["awake"], sampling(0.0))
    assert_logps(completion, running.model(), "awake", 0.0)


def test_it_says_that_it_is_healthy(running):
    assert running.run(running.engine.healthy())
