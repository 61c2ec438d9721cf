import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from RL2.engines.servers.weights import HostWeights, checksum
from RL2.runtime.errors import EngineError
from tests.rollout.support import make_model, make_tokenizer


@pytest.fixture
def weights():
    made = HostWeights()
    yield made
    made.close()


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        ("a", torch.randn(3, 5, generator=generator)),
        ("b", torch.randn(7, generator=generator).bfloat16()),
        ("c", torch.randn(2, 2, 2, generator=generator)),
    ]


def test_the_file_is_what_was_filled_in_the_first_time_and_later(weights):
    for version, seed in enumerate((0, 1, 2)):
        weights.fill(iter(tensors(seed)), version)
        assert weights.version == version
        on_disk = load_file(weights.folder / "model.safetensors")
        for (name, tensor), (expected_name, expected) in zip(weights, tensors(seed), strict=True):
            assert name == expected_name
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)
            assert torch.equal(on_disk[name], expected)
    assert weights.nbytes == 15 * 4 + 7 * 2 + 8 * 4


def test_floating_point_is_cast_and_the_rest_is_not():
    weights = HostWeights(torch.bfloat16)
    weights.fill([("w", torch.ones(3)), ("i", torch.arange(3))], 0)
    assert {name: t.dtype for name, t in weights} == {"w": torch.bfloat16, "i": torch.int64}
    weights.close()


def test_close_removes_the_folder(weights):
    weights.fill(tensors(), 0)
    folder = weights.folder
    assert folder.is_dir()
    weights.close()
    assert not folder.exists()
    with pytest.raises(EngineError, match="no weights have been published"):
        _ = weights.folder


def test_a_folder_of_the_user_stays(tmp_path):
    weights = HostWeights(folder=tmp_path / "w")
    weights.fill(tensors(), 0)
    weights.close()
    assert (tmp_path / "w" / "model.safetensors").is_file()


def test_the_folder_is_a_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m"))
    weights = HostWeights(config=model.config, tokenizer=make_tokenizer())
    weights.fill(model.named_parameters(), 0)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    weights.fill(model.named_parameters(), 1)
    again = AutoModelForCausalLM.from_pretrained(weights.folder)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight)
    assert (weights.folder / "tokenizer.json").is_file()
    weights.close()


def test_buckets_hold_everything_once_in_order(weights):
    weights.fill(tensors(), 0)
    buckets = list(weights.buckets(80))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["a", "b"], ["c"]]
    assert [len(bucket) for bucket in weights.buckets(1)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_checksum_adds_up_and_sees_one_bit(dtype):
    x = (torch.randn(64, 8) * 100).to(dtype)
    parts = sum(checksum(part) for part in x.split([10, 30, 24])) % 2**64
    assert checksum(x) == parts
    assert checksum(torch.cat([x, torch.zeros(5, 8, dtype=dtype)])) == checksum(x)
    changed = x.clone()
    bits = changed.view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])
    bits[3, 3] ^= 1
    assert checksum(changed) != checksum(x)


def test_checksums_are_of_the_current_version(weights):
    weights.fill(tensors(0), 0)
    before = weights.checksums()
    assert before == {name: checksum(tensor) for name, tensor in tensors(0)}
    weights.fill(tensors(1), 1)
    assert weights.checksums() == {name: checksum(tensor) for name, tensor in tensors(1)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[:-1], "weight update 1: c is missing"),
        (lambda t: [*t, ("d", torch.ones(1))], "d was not there before"),
        (lambda t: [("a", torch.ones(3, 4)), *t[1:]], r"a has shape \(3, 4\), \(3, 5\) before"),
    ],
)
def test_another_model_is_named(weights, change, message):
    weights.fill(tensors(), 0)
    with pytest.raises(EngineError, match=message):
        weights.fill(change(tensors()), 1)
    assert weights.version == 0


def test_nothing_to_publish_is_an_error(weights):
    with pytest.raises(EngineError, match="no parameter"):
        weights.fill([], 0)


def test_a_folder_without_room_is_named(small_disk):
    disk = small_disk("16k")
    weights = HostWeights(folder=disk / "weights")
    with pytest.raises(EngineError) as caught:
        weights.fill([("a", torch.zeros(10_000))], 0)
    assert str(caught.value).startswith("rollout.weights_dir: the copy of the weights that ")
    assert f"40000 bytes, cannot be written to {disk}/weights (" in str(caught.value)
    assert weights.version is None and len(weights) == 0
