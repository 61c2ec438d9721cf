import pytest


@pytest.fixture(autouse=True)
def no_fallback_to_eager(request):
    """torch.compile gives up, with a warning, after eight versions of a function: `compiled` would
    then be `tiled`. These tests ask for more versions than a training run."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("implementation") != "compiled":
        yield
        return
    from torch._dynamo import config

    with config.patch(recompile_limit=200, fail_on_recompile_limit_hit=True):
        yield
