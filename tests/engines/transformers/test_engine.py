import asyncio
import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from RL2.engines.protocol import SamplingParams
from RL2.engines.transformers.engine import TransformersEngine
from RL2.runtime.errors import EngineError
from tests.rollout.support import EOS, PAD, make_model, reference_logps

UNEQUAL_PROMPTS = [[7] * 1, [9, 8, 7], list(range(10, 90)), [33] * 17, list(range(100, 104))]


def complete(engine, prompts, sampling, seeds=None):
    """Completions of all prompts, sent at once."""

    async def all_at_once():
        return await asyncio.gather(
            *(
                engine.generate(prompt, sampling, seed=seed)
                for prompt, seed in zip(prompts, seeds or range(len(prompts)), strict=True)
            )
        )

    return asyncio.run(all_at_once())


@pytest.fixture
def engine(byte_model, byte_tokenizer):
    engine = TransformersEngine(byte_model, tokenizer=byte_tokenizer)
    yield engine
    asyncio.run(engine.close())


# ------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logps_are_those_of_an_unpadded_forward(family, temperature, tmp_path, byte_tokenizer):
    path = make_model(tmp_path, family, eos_token_id=[EOS, *range(60, 86)])
    engine = TransformersEngine(path, tokenizer=byte_tokenizer)
    completions = complete(engine, UNEQUAL_PROMPTS, SamplingParams(temperature, 24))
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for prompt, completion in zip(UNEQUAL_PROMPTS, completions, strict=True):
        expected = reference_logps(model, prompt, completion.token_ids, temperature)
        assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-5, rtol=0)
    # Rows ended at different places, so the batch was cut smaller on the way.
    if temperature == 1.0:
        assert len({len(c.token_ids) for c in completions}) > 1
    asyncio.run(engine.close())


def test_greedy_is_the_argmax_of_the_model(engine, byte_model):
    model = AutoModelForCausalLM.from_pretrained(byte_model).eval()
    completions = complete(engine, UNEQUAL_PROMPTS, SamplingParams(0.0, 12))
    for prompt, completion in zip(UNEQUAL_PROMPTS, completions, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


# ------------------------------------------------------------------------ sampling


def test_tokens_do_not_depend_on_the_batch(byte_model, byte_tokenizer):
    sampling = SamplingParams(1.0, 40)
    prompts = [[10 + i % 50] * (1 + 7 * i % 23) for i in range(24)]
    seeds = [1000 + i for i in range(24)]

    def run(max_batch_size, order):
        engine = TransformersEngine(
            byte_model, tokenizer=byte_tokenizer, max_batch_size=max_batch_size
        )
        done = complete(engine, [prompts[i] for i in order], sampling, [seeds[i] for i in order])
        asyncio.run(engine.close())
        return {i: completion.token_ids for i, completion in zip(order, done, strict=True)}

    together = run(64, range(24))
    assert len({len(ids) for ids in together.values()}) > 5
    set_seed(5)  # the global generator must not enter
    assert run(5, range(23, -1, -1)) == together
    assert run(1, range(0, 24, 7)) == {i: together[i] for i in range(0, 24, 7)}


def test_seeds_differ_and_repeat(engine):
    sampling = SamplingParams(1.0, 10)
    one, two, again = complete(engine, [[5, 6]] * 3, sampling, [3, 4, 3])
    assert one == again
    assert one.token_ids != two.token_ids


def test_samples_follow_the_models_distribution(engine, byte_model):
    prompt, n, temperature = [40, 41, 42], 6000, 0.8
    model = AutoModelForCausalLM.from_pretrained(byte_model).eval()
    with torch.no_grad():
        probs = (model(torch.tensor([prompt])).logits[0, -1].float() / temperature).softmax(-1)
    sampling = SamplingParams(temperature, 1)
    completions = complete(engine, [prompt] * n, sampling)
    counts = torch.bincount(
        torch.tensor([c.token_ids[0] for c in completions]), minlength=len(probs)
    )
    # Pearson's chi-square over the tokens expected at least 5 times, the rest as one bin.
    common = probs * n >= 5
    expected = torch.cat([probs[common] * n, probs[~common].sum()[None] * n])
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_top_p_samples_the_nucleus_and_reports_the_full_distribution(engine, byte_model):
    prompt, temperature, top_p = [40, 41, 42], 0.8, 0.3
    model = AutoModelForCausalLM.from_pretrained(byte_model).eval()
    with torch.no_grad():
        logps = (model(torch.tensor([prompt])).logits[0, -1].float() / temperature).log_softmax(-1)
    order = logps.argsort(descending=True)
    before = logps[order].exp().cumsum(0) - logps[order].exp()
    nucleus = set(order[before < top_p].tolist())
    assert 1 < len(nucleus) < 100
    completions = complete(engine, [prompt] * 500, SamplingParams(temperature, 1, top_p=top_p))
    assert {c.token_ids[0] for c in completions} == nucleus
    for completion in completions[:20]:
        expected = logps[completion.token_ids[0]].item()
        assert completion.logps[0] == pytest.approx(expected, abs=1e-5)


def test_a_group_reads_its_prompt_once(byte_model, byte_tokenizer):
    engine = TransformersEngine(byte_model, tokenizer=byte_tokenizer)
    prompts, sampling = [[40 + i for i in range(30)], [50], [60, 61, 62]], SamplingParams(1.0, 6)
    alone = [complete(engine, [prompt] * 4, sampling, range(4)) for prompt in prompts]
    read = []
    hook = engine.decoder.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].shape)
    )
    together = complete(engine, [p for p in prompts for _ in range(4)], sampling, [*range(4)] * 3)
    hook.remove()
    assert [c.token_ids for c in together] == [c.token_ids for four in alone for c in four]
    # Three prompts but their last tokens; then a token at a time, by as many rows as go on.
    assert read[:2] == [(3, 29), (12, 1)]
    assert all(length == 1 for _, length in read[1:])


def test_the_checkpoints_own_sampling_settings_do_not_enter(engine, tmp_path, byte_tokenizer):
    path = make_model(
        tmp_path, eos_token_id=[1, *range(60, 86)], do_sample=True, top_k=1, temperature=0.1,
        repetition_penalty=5.0, max_length=3,
    )  # fmt: skip
    spoilt = TransformersEngine(path, tokenizer=byte_tokenizer)
    sampling = SamplingParams(1.0, 16)
    assert complete(spoilt, UNEQUAL_PROMPTS, sampling) == complete(
        engine, UNEQUAL_PROMPTS, sampling
    )


# ------------------------------------------------------------------------ ends


def test_rows_end_at_any_end_token_or_at_the_limit(engine):
    ends = {1, *range(60, 86)}
    completions = complete(engine, [[50, 51]] * 40, SamplingParams(1.0, 10))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.token_ids) == len(c.logps) <= 10
        assert not ends & set(c.token_ids[:-1])
        assert (c.token_ids[-1] in ends) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.token_ids) == 10


def test_requests_of_other_sampling_parameters_share_no_batch(engine):
    async def mixed():
        return await asyncio.gather(
            *(
                engine.generate([9, 9], SamplingParams(t, n), seed=0)
                for t, n in [(0.0, 3), (1.0, 8), (0.0, 8), (1.0, 3)]
            )
        )

    short, hot, greedy, hot_short = asyncio.run(mixed())
    assert greedy.token_ids[:3] == short.token_ids
    assert hot.token_ids[:3] == hot_short.token_ids
    assert hot.token_ids != greedy.token_ids


def test_stop_strings_end_a_row_and_stay_in_its_tokens(engine, byte_tokenizer):
    prompts = [[50 + i] for i in range(60)]
    free = complete(engine, prompts, SamplingParams(1.0, 12))
    row, start, stop = next(  # two neighbouring bytes that are text, somewhere in a response
        (i, k, text)
        for i, completion in enumerate(free)
        for k in range(1, len(completion.token_ids) - 2)
        if (text := byte_tokenizer.decode(completion.token_ids[k : k + 2])).isascii()
    )
    stopped = complete(engine, prompts, SamplingParams(1.0, 12, stop=(stop, "no such text")))
    assert stopped[row].token_ids == free[row].token_ids[: start + 2]
    assert stopped[row].finish_reason == "stop"
    for one, other in zip(stopped, free, strict=True):
        assert one.token_ids == other.token_ids[: len(one.token_ids)]


def test_a_stop_string_does_not_begin_in_the_prompt(engine, byte_tokenizer):
    prompt, sampling = byte_tokenizer.encode("abc"), SamplingParams(1.0, 12)
    seed, free, first = next(
        (seed, completion, text)
        for seed, completion in enumerate(complete(engine, [prompt] * 40, sampling))
        if (text := byte_tokenizer.decode(completion.token_ids[:1])).isascii()
        and len(completion.token_ids) > 1
    )
    across = SamplingParams(1.0, 12, stop=("c" + first,))
    assert complete(engine, [prompt], across, [seed])[0].token_ids == free.token_ids


# ------------------------------------------------------------------------ weights


def weights_of(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_new_weights_are_served_under_their_version(engine, tmp_path, byte_tokenizer):
    other = make_model(tmp_path, seed=1, eos_token_id=[1, *range(60, 86)])
    sampling = SamplingParams(1.0, 16)
    old = complete(engine, UNEQUAL_PROMPTS, sampling)
    asyncio.run(engine.update_weights(weights_of(other).items(), 7))
    new = complete(engine, UNEQUAL_PROMPTS, sampling)
    fresh = TransformersEngine(other, tokenizer=byte_tokenizer)
    expected = complete(fresh, UNEQUAL_PROMPTS, sampling)
    assert [c.token_ids for c in new] == [c.token_ids for c in expected]
    assert [c.logps for c in new] == [c.logps for c in expected]
    assert {v for c in new for v in c.weight_versions} == {7}
    assert {v for c in old for v in c.weight_versions} == {0}
    assert new[2].token_ids != old[2].token_ids


def test_weights_wait_for_open_requests(engine, tmp_path):
    other = make_model(tmp_path, seed=1)

    async def both():
        request = asyncio.create_task(engine.generate([5], SamplingParams(1.0, 30), seed=0))
        await asyncio.sleep(0)
        await engine.update_weights(weights_of(other).items(), 1)
        return await request

    assert set(asyncio.run(both()).weight_versions) == {0}
    assert engine.weight_version == 1


def test_a_tied_parameter_may_come_under_one_name(engine, byte_model):
    weights = weights_of(byte_model)
    assert (
        weights.pop("lm_head.weight").data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    )
    asyncio.run(engine.update_weights(weights.items(), 1))
    weights = weights_of(byte_model)
    del weights["model.embed_tokens.weight"]
    asyncio.run(engine.update_weights(weights.items(), 2))


def test_wrong_weights_are_named(engine, byte_model):
    weights = weights_of(byte_model)
    with pytest.raises(EngineError, match="strange.weight is not a parameter"):
        asyncio.run(engine.update_weights({**weights, "strange.weight": torch.ones(1)}.items(), 1))
    with pytest.raises(EngineError, match=r"model.norm.weight has shape \(5,\)"):
        asyncio.run(engine.update_weights([("model.norm.weight", torch.ones(5))], 1))
    del weights["model.norm.weight"]
    with pytest.raises(EngineError, match="model.norm.weight is missing"):
        asyncio.run(engine.update_weights(weights.items(), 1))
    assert engine.weight_version == 0


def test_nan_logits_are_an_error(engine, byte_model):
    weights = weights_of(byte_model)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    asyncio.run(engine.update_weights(weights.items(), 3))
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="NaN.*version 3"):
            complete(engine, [[5, 6], [7]], SamplingParams(temperature, 4))


# ------------------------------------------------------------------------ abort, pause


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def watch(engine):
    """Counts the model's forward passes, so that tests can act in the middle of a batch."""
    passes = []
    engine.decoder.model.register_forward_hook(lambda *_: passes.append(engine.weight_version))
    return passes


LONG = SamplingParams(1.0, 200, stop=("no such text",))


@pytest.fixture
def endless(tmp_path, byte_tokenizer):
    """An engine whose model has no end token."""
    engine = TransformersEngine(make_model(tmp_path), tokenizer=byte_tokenizer, max_batch_size=4)
    engine.decoder.eos_ids = ()
    engine.decoder.model.generation_config.eos_token_id = None
    yield engine
    asyncio.run(engine.close())


def test_abort_returns_what_is_written_and_nothing_of_what_waits(endless):
    whole = complete(endless, [[5 + i] for i in range(7)], LONG)
    passes = watch(endless)

    async def aborted():
        requests = [asyncio.create_task(endless.generate([5 + i], LONG, seed=i)) for i in range(7)]
        await until(lambda: len(passes) > 10)
        late = asyncio.create_task(endless.generate([50], LONG, seed=9))
        await asyncio.sleep(0)
        await endless.abort()
        after = asyncio.create_task(endless.generate([5], SamplingParams(1.0, 3), seed=0))
        return await asyncio.gather(*requests, late), await after

    parts, after = asyncio.run(aborted())
    assert {c.finish_reason for c in parts} == {"abort"}
    n = [len(c.token_ids) for c in parts]
    assert all(10 <= k < 190 for k in n[:4]) and n[4:] == [0] * 4
    for part, all_of_it in zip(parts, whole, strict=False):
        k = len(part.token_ids)
        assert part.token_ids == all_of_it.token_ids[:k]
        assert part.logps == all_of_it.logps[:k]
        assert part.weight_versions == [0] * k
    # A request that comes after the abort is none of its business.
    assert after.token_ids == whole[0].token_ids[:3] and after.finish_reason == "length"


def test_nothing_is_written_while_paused_and_nothing_is_different_after(endless):
    prompts = [[5 + i] * (1 + i) for i in range(6)]  # two batches
    whole = complete(endless, prompts, LONG)
    passes = watch(endless)

    async def interrupted():
        requests = [
            asyncio.create_task(endless.generate(p, LONG, seed=i)) for i, p in enumerate(prompts)
        ]
        for n in (5, 60, 250):
            await until(lambda n=n: len(passes) > n)
            await endless.pause()
            before = len(passes)
            await asyncio.sleep(0.05)
            assert len(passes) == before
            assert not all(request.done() for request in requests)
            assert await endless.healthy()
            await endless.resume()
        return await asyncio.gather(*requests)

    for one, other in zip(asyncio.run(interrupted()), whole, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_weights_that_come_in_a_pause_write_the_rest(endless, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    models = [
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (endless.decoder.model.name_or_path, other)
    ]
    passes = watch(endless)
    prompts = [[5, 6], [7], [8, 9, 10]]

    async def updated():
        requests = [
            asyncio.create_task(endless.generate(p, LONG, seed=i)) for i, p in enumerate(prompts)
        ]
        await until(lambda: len(passes) > 20)
        await endless.pause()
        await endless.update_weights(models[1].state_dict().items(), 1)
        await endless.resume()
        return await asyncio.gather(*requests)

    for prompt, completion in zip(prompts, asyncio.run(updated()), strict=True):
        versions = torch.tensor(completion.weight_versions)
        assert versions.tolist() == sorted(versions.tolist()) and set(versions.tolist()) == {0, 1}
        # The rest reads its prompt anew: by the new weights on all tokens, not on an old cache.
        expected = torch.stack(
            [reference_logps(model, prompt, completion.token_ids, 1.0) for model in models]
        ).gather(0, versions[None])[0]
        assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-5, rtol=0)


def test_abort_and_close_reach_a_paused_engine(endless):
    passes = watch(endless)

    async def stopped(stop):
        request = asyncio.create_task(endless.generate([5], LONG, seed=0))
        n = len(passes)
        await until(lambda: len(passes) > n + 5)
        await endless.pause()
        await stop()
        completion = await asyncio.wait_for(request, 10)
        await endless.resume()
        return completion

    for stop in (endless.abort, endless.close):
        completion = asyncio.run(stopped(stop))
        assert completion.finish_reason == "abort" and len(completion.token_ids) > 4
    assert not asyncio.run(endless.healthy())


def test_a_batch_that_nobody_waits_for_is_broken_off(endless):
    passes = watch(endless)

    async def cancelled():
        request = asyncio.create_task(endless.generate([5], LONG, seed=0))
        await until(lambda: len(passes) > 5)
        request.cancel()
        return await endless.generate([6], SamplingParams(1.0, 3), seed=0)

    assert len(asyncio.run(cancelled()).token_ids) == 3
    assert len(passes) < 100


def test_an_eager_engine_hands_out_what_is_complete(byte_model, byte_tokenizer):
    prompts, sampling = [[5 + i] for i in range(16)], SamplingParams(1.0, 100)

    def run(eager):
        engine = TransformersEngine(byte_model, tokenizer=byte_tokenizer, eager=eager)
        passes, at = watch(engine), []

        async def one(i):
            completion = await engine.generate(prompts[i], sampling, seed=i)
            at.append(len(passes))
            return completion

        async def all_of_them():
            done = await asyncio.gather(*(one(i) for i in range(16)))
            await engine.close()
            return done

        return asyncio.run(all_of_them()), at

    (whole, together), (same, at) = run(False), run(True)
    assert same == whole
    assert len(set(together)) == 1 and len(set(at)) > 2


# ------------------------------------------------------------------------ refusals


def test_requests_that_do_not_fit_are_refused(engine):
    with pytest.raises(EngineError, match="max_new_tokens=100.*context of 256"):
        complete(engine, [[5] * 157], SamplingParams(1.0, 100))
    with pytest.raises(EngineError, match="no tokens"):
        complete(engine, [[]], SamplingParams(1.0, 4))
    assert len(complete(engine, [[5] * 250], SamplingParams(0.0, 6))) == 1


def test_a_model_that_does_not_load_is_named(tmp_path, byte_tokenizer):
    with pytest.raises(EngineError, match="rollout.model_name=.*nothing_here"):
        TransformersEngine(str(tmp_path / "nothing_here"), tokenizer=byte_tokenizer)


def test_close_fails_what_waits_and_refuses_more(byte_model, byte_tokenizer):
    engine = TransformersEngine(byte_model, tokenizer=byte_tokenizer)

    async def close_early():
        request = asyncio.create_task(engine.generate([5], SamplingParams(1.0, 4), seed=0))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await request
        with pytest.raises(EngineError, match="after close"):
            await engine.generate([5], SamplingParams(1.0, 4), seed=0)

    asyncio.run(close_early())
    assert engine.decoder.model is None
    assert PAD == engine.decoder.tokenizer.pad_token_id


@pytest.mark.parametrize(("dtype", "kept"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_dtype(byte_model, byte_tokenizer, dtype, kept):
    engine = TransformersEngine(byte_model, tokenizer=byte_tokenizer, dtype=dtype)
    assert engine.decoder.model.dtype == getattr(torch, kept)
    asyncio.run(engine.update_weights(weights_of(byte_model).items(), 1))  # cast on the way
    [completion] = complete(engine, [[5, 6]], SamplingParams(1.0, 4))
    assert engine.decoder.model.dtype == getattr(torch, kept)
    assert all(math.isfinite(logp) for logp in completion.logps)


def test_a_pad_token_that_the_model_has_no_row_for(byte_model, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    engine = TransformersEngine(byte_model, tokenizer=tokenizer)
    assert tokenizer.pad_token_id >= engine.decoder.model.get_input_embeddings().num_embeddings
    sampling = SamplingParams(1.0, 4)
    completions = complete(engine, UNEQUAL_PROMPTS, sampling)
    usual = TransformersEngine(byte_model, tokenizer=byte_tokenizer)
    for one, other in zip(completions, complete(usual, UNEQUAL_PROMPTS, sampling), strict=True):
        assert one.token_ids == other.token_ids


def test_it_needs_the_models_files_no_more(tmp_path, byte_tokenizer):
    """They may be truncated or overwritten while it generates."""
    path = make_model(tmp_path)
    engine = TransformersEngine(path, tokenizer=byte_tokenizer)
    assert engine.decoder.model.lm_head.weight.any()
    assert str(path) not in Path("/proc/self/maps").read_text()
