"""fp32 products are fp32 products, whoever computes them."""

import torch

from RL2.ops.fp32 import fast_fp32


def test_products_stay_exact_and_the_switch_goes_back():
    torch.manual_seed(0)
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with fast_fp32(torch.device("cpu")):
        within = matmul.fp32_precision
        with fast_fp32(torch.device("cpu")):
            assert matmul.fp32_precision == within
        assert matmul.fp32_precision == within
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert matmul.fp32_precision == before


def test_other_devices_are_left_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_fp32(torch.device("cuda")):
        assert torch.backends.mkldnn.matmul.fp32_precision == before
